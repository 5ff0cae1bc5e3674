// The entry point of one kernel, EMULATED_KERNEL. It copies every array into an allocation of exactly its size, so that the
// address sanitizer sees an access beyond it, launches, and copies the arrays back.
//
// The parameters of the kernel come as on the GPU: 64-bit words, one after the other. Their types are those of the kernel.
#pragma once

#include <tuple>
#include <vector>

namespace msda {}
using namespace msda;

namespace emulator {

// The next parameter, of as many words as its type has.
template <typename T>
T take(const long long*& word) {
    static_assert(sizeof(T) % sizeof(long long) == 0, "a parameter is made of 64-bit words");
    T parameter;
    memcpy((void*)&parameter, word, sizeof parameter);
    word += sizeof(T) / sizeof(long long);
    return parameter;
}

template <typename... Parameters>
void apply(void (*kernel)(Parameters...), const long long* words) {
    std::tuple<Parameters...> parameters{take<Parameters>(words)...};   // in braces: from left to right
    std::apply(kernel, parameters);
}

template <typename... Parameters>
constexpr long long words_of(void (*)(Parameters...)) {
    return (long long)((sizeof(Parameters) + ... + 0) / sizeof(long long));
}

inline void enter(void* words) { apply(EMULATED_KERNEL, (const long long*)words); }

// What a launch is, in numbers. After them come the words of the parameters, the size of each array in bytes, and for each
// word that is an address: which word, which array, and how many bytes from its beginning.
struct Launch {
    long long words, arrays, addresses;
    long long grid[3], block, shared_bytes, order;
};
enum { LAUNCH_NUMBERS = sizeof(Launch) / sizeof(long long) };

struct Address {
    long long word, array, offset;
};

}  // namespace emulator

// Returns null, or what went wrong.
extern "C" const char* emulate(const long long* numbers, void** arrays) {
    const emulator::Launch& launch = *(const emulator::Launch*)numbers;
    if (launch.words != emulator::words_of(EMULATED_KERNEL)) return "the kernel has other parameters than these words";
    std::vector<long long> words(numbers + emulator::LAUNCH_NUMBERS, numbers + emulator::LAUNCH_NUMBERS + launch.words);
    const long long* sizes = numbers + emulator::LAUNCH_NUMBERS + launch.words;
    const emulator::Address* addresses = (const emulator::Address*)(sizes + launch.arrays);
    std::vector<char*> copies;
    for (long long i = 0; i < launch.arrays; ++i) {
        copies.push_back((char*)malloc(sizes[i] ? (size_t)sizes[i] : 1));
        memcpy(copies[i], arrays[i], (size_t)sizes[i]);
    }
    for (long long i = 0; i < launch.addresses; ++i)
        words[addresses[i].word] = (long long)(copies[addresses[i].array] + addresses[i].offset);
    const char* wrong = emulator::launch(emulator::enter, words.data(), launch.grid, (int)launch.block,
                                         (size_t)launch.shared_bytes, (int)launch.order);
    for (long long i = 0; i < launch.arrays; ++i) {
        memcpy(arrays[i], copies[i], (size_t)sizes[i]);
        free(copies[i]);
    }
    return wrong;
}

#ifdef EMULATOR_MAIN
// argv[1]: how many numbers, the numbers, and the arrays one after the other, which are written back in place.
int main(int, char** argv) {
    FILE* file = fopen(argv[1], "r+b");
    long long count;
    if (!file || fread(&count, sizeof count, 1, file) != 1) return 4;
    std::vector<long long> numbers((size_t)count);
    if (fread(numbers.data(), sizeof count, numbers.size(), file) != numbers.size()) return 4;
    const emulator::Launch& launch = *(const emulator::Launch*)numbers.data();
    std::vector<std::vector<char>> data;
    std::vector<void*> arrays;
    for (long long i = 0; i < launch.arrays; ++i) {
        data.emplace_back((size_t)numbers[emulator::LAUNCH_NUMBERS + launch.words + i]);
        if (!data.back().empty() && fread(data.back().data(), 1, data.back().size(), file) != data.back().size()) return 4;
    }
    for (auto& array : data) arrays.push_back(array.data());
    if (const char* wrong = emulate(numbers.data(), arrays.data())) {
        fprintf(stderr, "EMULATOR: %s\n", wrong);
        return 3;
    }
    fseek(file, (long)(sizeof count * (1 + numbers.size())), SEEK_SET);
    for (auto& array : data)
        if (!array.empty()) fwrite(array.data(), 1, array.size(), file);
    return fclose(file);
}
#endif
