// Threads of a block, and how many blocks should fit on a multiprocessor.
#pragma once
#include "common/config.cuh"

namespace msda {

enum : int { threads_per_block = 32 * config::warps };

// Threads that a multiprocessor holds.
#if __CUDA_ARCH__ == 750
enum : int { max_resident_threads = 1024 };
#elif __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
enum : int { max_resident_threads = 1536 };
#else
enum : int { max_resident_threads = 2048 };
#endif

// For __launch_bounds__, which caps the registers.
enum : int { max_resident_blocks = max_resident_threads / threads_per_block };
enum : int { resident_blocks = config::min_blocks < max_resident_blocks ? config::min_blocks : max_resident_blocks };

}  // namespace msda
