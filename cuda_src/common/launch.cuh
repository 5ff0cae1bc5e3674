// Threads of a block, and how many blocks should fit on a multiprocessor.
#pragma once
#include "common/config.cuh"

namespace msda {

enum : int { threads_per_block = 32 * config::warps };
enum : int { resident_blocks = config::min_blocks };    // the planner asks for no more than the GPU holds

}  // namespace msda
