// Threads of a block. `config::min_blocks` for `__launch_bounds__` is no more than the GPU holds: the planner sees to it.
#pragma once
#include "common/config.cuh"

namespace msda {

enum : int { threads_per_block = 32 * config::warps };

}  // namespace msda
