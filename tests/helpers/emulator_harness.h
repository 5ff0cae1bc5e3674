// The entry point of one kernel, EMULATED_KERNEL. It copies every array into an allocation of exactly its size, so that the
// address sanitizer sees an access beyond it, launches, and copies the arrays back.
//
// The parameters of the kernel come as on the GPU: 64-bit words, one after the other. Their types are those of the kernel.
#pragma once

#include <tuple>

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
    const long long* sizes = numbers + emulator::LAUNCH_NUMBERS + launch.words;
    // A word more, because a launch may have none.
    long long* words = (long long*)malloc((size_t)(launch.words + 1) * sizeof(long long));
    memcpy(words, numbers + emulator::LAUNCH_NUMBERS, (size_t)launch.words * sizeof(long long));
    const emulator::Address* addresses = (const emulator::Address*)(sizes + launch.arrays);
    char** copies = (char**)malloc((size_t)(launch.arrays + 1) * sizeof(char*));
    for (long long i = 0; i < launch.arrays; ++i) {
        copies[i] = (char*)malloc(sizes[i] ? (size_t)sizes[i] : 1);
        memcpy(copies[i], arrays[i], (size_t)sizes[i]);
        access_log::watch(copies[i], (size_t)sizes[i]);
    }
    for (long long i = 0; i < launch.addresses; ++i)
        words[addresses[i].word] = (long long)(copies[addresses[i].array] + addresses[i].offset);
    const char* wrong = emulator::launch(emulator::enter, words, launch.grid, (int)launch.block,
                                         (size_t)launch.shared_bytes, (int)launch.order);
    for (long long i = 0; i < launch.arrays; ++i) {
        memcpy(arrays[i], copies[i], (size_t)sizes[i]);
        free(copies[i]);
    }
    free(copies);
    free(words);
    return wrong;
}

#ifdef EMULATOR_MAIN
// argv[1]: how many numbers, the numbers, and the arrays one after the other, which are written back in place.
int main(int, char** argv) {
    FILE* file = fopen(argv[1], "r+b");
    if (!file || fseek(file, 0, SEEK_END)) return 4;
    const size_t bytes = (size_t)ftell(file);
    char* data = (char*)malloc(bytes);
    rewind(file);
    if (fread(data, 1, bytes, file) != bytes) return 4;
    const long long count = *(const long long*)data, *numbers = (const long long*)data + 1;
    const emulator::Launch& launch = *(const emulator::Launch*)numbers;
    void** arrays = (void**)malloc((size_t)(launch.arrays + 1) * sizeof(void*));
    char* array = (char*)(numbers + count);
    for (long long i = 0; i < launch.arrays; ++i) {
        arrays[i] = array;
        array += numbers[emulator::LAUNCH_NUMBERS + launch.words + i];
    }
    if (const char* wrong = emulate(numbers, arrays)) {
        fprintf(stderr, "EMULATOR: %s\n", wrong);
        return 3;
    }
    rewind(file);
    return fwrite(data, 1, bytes, file) == bytes && fclose(file) == 0 ? 0 : 4;
}
#endif
