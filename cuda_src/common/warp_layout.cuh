// How a warp is divided: a tile is the queries, of one or more neighbouring heads, that a warp works on at a time.
#pragma once
#include "common/config.cuh"

namespace msda {

enum : int { queries_per_tile = 32 / (config::lanes * config::lane_groups * config::heads_per_warp) };
enum : int { pairs_per_tile = queries_per_tile * config::heads_per_warp };   // pairs of a query and a head, query by query
enum : int { queries_per_block = config::warps * config::query_tiles * queries_per_tile };

// Samples of a pair in shared memory, padded to an odd number: the pairs of a warp then lie in different banks.
enum : int { sample_pitch = config::chunk | 1 };

}  // namespace msda
