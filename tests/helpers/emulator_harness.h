// Entry points around one kernel: copies every array into an allocation of exactly its size, so that the address
// sanitizer sees an access beyond it, launches, and copies the results back. EMULATED_KIND: 0 forward, 1 backward,
// 2 round, 3 sort, 4 sum, 5 add, 6 count, 7 expand, 8 references. Arrays in the order of the kernel's parameters, then spatial_shapes and level_start_index
// where the levels are on the device (a size of -1 is a null pointer).
#pragma once

#include <vector>

namespace emulator {

struct Call {
    std::vector<void*> arrays;
    long long S, Q;
    const long long* more;  // sizes that only some kernels have
};

inline void enter(void* pointer) {
    Call& call = *(Call*)pointer;
    std::vector<void*>& a = call.arrays;
#if EMULATED_KIND == 2
    msda_round((const float*)a[0], (msda_value*)a[1], call.S);
#elif EMULATED_KIND == 4
    const long long* more = call.more;
    msda_sum((const msda_value*)a[0], (const msda_entry*)a[1], (const unsigned short*)a[2], (msda_value*)a[3], call.S,
             call.Q, more[0], more[1], more[2], more[3], more[4], more[5], (msda_counts*)a[4], (const msda_piece*)a[5],
             (msda_acc*)a[6], more[6]);
#elif EMULATED_KIND == 5
    const long long* more = call.more;
    msda_add((const msda_value*)a[0], (const msda_entry*)a[1], (const unsigned short*)a[2], (msda_value*)a[3], call.S,
             call.Q, more[0], more[1], more[2], more[3], more[4], more[5]);
#elif EMULATED_KIND == 6
    msda_count((const unsigned short*)a[0], (msda_counts*)a[1], (msda_piece*)a[2], call.more[0], call.more[5],
               call.more[6]);
#elif EMULATED_KIND == 8
    msda_references((const msda_acc*)a[0], (msda_reference*)a[1], call.S);
#else
    msda_metadata metadata;
#if MSDA_LEVELS_ON_DEVICE
    metadata.shapes = (const long long*)a[a.size() - 2];
    metadata.starts = (const long long*)a[a.size() - 1];
#else
    memcpy(&metadata, a[1], sizeof metadata);
#endif
    const msda_location* locations = (const msda_location*)a[2];
    const msda_location* weights = (const msda_location*)a[3];
    if (MSDA_PACKED) weights = locations + 2 * MSDA_K;
#if EMULATED_KIND == 0
    msda_forward((const msda_value*)a[0], metadata, locations, weights, (const msda_reference*)a[4],
                 (const long long*)a[5], (msda_value*)a[6], call.S, call.Q, call.more[0], call.more[1],
                 call.more[2]);
#elif EMULATED_KIND == 7
    msda_expand(locations, metadata, weights, (const msda_reference*)a[4], (const long long*)a[5], (msda_acc*)a[6],
                (msda_acc*)a[7], call.S, call.Q, call.more[0]);
#elif EMULATED_KIND == 3
    const long long* more = call.more;
    msda_sort(locations, metadata, weights, (const msda_reference*)a[4], (const long long*)a[5],
              (unsigned short*)a[6], (msda_entry*)a[7], (msda_counts*)a[8], call.S, call.Q, more[2], more[3], more[4],
              more[5]);
#else
    msda_location *grad_locations = (msda_location*)a[8], *grad_weights = (msda_location*)a[9];
    if (MSDA_PACKED) grad_weights = grad_locations + 2 * MSDA_K;
    msda_backward((const msda_value*)a[0], metadata, locations, weights, (const msda_reference*)a[4],
                  (const long long*)a[5], (const msda_value*)a[6], (msda_acc*)a[7], grad_locations, grad_weights,
                  (msda_acc*)a[10], call.S, call.Q, call.more[0], call.more[1], call.more[2]);
#endif
#endif
}

}  // namespace emulator

// numbers: count of arrays, S, Q, grid (x, y, z), block, shared bytes, order, seven more sizes (runs, capacity, first head,
// heads, first row, rows, parts of a piece; of the forward and the backward: value's image and head stride, heads; of the
// expansion: heads), then the size of each array in bytes.
enum { NUMBERS = 16 };

extern "C" const char* emulate(const long long* numbers, void** arrays) {
    emulator::Call call;
    call.S = numbers[1];
    call.Q = numbers[2];
    call.more = numbers + 9;
    for (int i = 0; i < numbers[0]; ++i) {
        const long long size = numbers[NUMBERS + i];
        void* copy = size < 0 ? nullptr : malloc(size ? (size_t)size : 1);
        if (size > 0) memcpy(copy, arrays[i], (size_t)size);
        call.arrays.push_back(copy);
    }
    const char* wrong = emulator::launch(emulator::enter, &call, numbers + 3, (int)numbers[6], (size_t)numbers[7],
                                         (int)numbers[8]);
    for (int i = 0; i < numbers[0]; ++i) {
        if (numbers[NUMBERS + i] > 0) memcpy(arrays[i], call.arrays[i], (size_t)numbers[NUMBERS + i]);
        free(call.arrays[i]);
    }
    return wrong;
}

#ifdef EMULATOR_MAIN
// argv[1]: the numbers and the arrays, one after the other; written back in place.
int main(int, char** argv) {
    FILE* file = fopen(argv[1], "r+b");
    long long head[NUMBERS];
    if (!file || fread(head, 8, NUMBERS, file) != NUMBERS) return 4;
    std::vector<long long> numbers(head, head + NUMBERS);
    numbers.resize((size_t)(NUMBERS + head[0]));
    if (fread(&numbers[NUMBERS], 8, (size_t)head[0], file) != (size_t)head[0]) return 4;
    std::vector<std::vector<char>> data;
    std::vector<void*> arrays;
    for (int i = 0; i < head[0]; ++i) {
        data.emplace_back((size_t)(numbers[NUMBERS + i] > 0 ? numbers[NUMBERS + i] : 0));
        if (!data.back().empty() && fread(data.back().data(), 1, data.back().size(), file) != data.back().size()) return 4;
    }
    for (auto& array : data) arrays.push_back(array.data());
    if (const char* wrong = emulate(numbers.data(), arrays.data())) {
        fprintf(stderr, "EMULATOR: %s\n", wrong);
        return 3;
    }
    fseek(file, (long)(8 * numbers.size()), SEEK_SET);
    for (auto& array : data)
        if (!array.empty()) fwrite(array.data(), 1, array.size(), file);
    return fclose(file);
}
#endif
