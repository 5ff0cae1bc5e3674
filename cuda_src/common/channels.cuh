// The channels of a value vector (D channels of one pixel and head) and the lanes that share them.
//
// Each of `config::lanes` lanes moves `config::vec` channels at once: together a channel tile. Where D is wider, the lanes
// take several tiles one after the other.
#pragma once
#include "common/types.cuh"
#include "common/vectors.cuh"

namespace msda {

enum : int { channel_tile = config::lanes * config::vec };
enum : int { channel_tiles = (config::D + channel_tile - 1) / channel_tile };

enum : int { groups_per_warp = 32 / config::lanes };     // groups of `lanes` lanes

using channel_vector = vector<value_t, config::vec>;

// Read-only data, through L1.
template <int N = config::vec>
__device__ __forceinline__ vector<value_t, N> load_channels(address_t address) {
    vector<value_t, N> v;
    v.word = __ldg(reinterpret_cast<const decltype(v.word)*>(address));
    return v;
}

// The same where `present`, zeros elsewhere: a predicated load, no branch. (Predicated additions instead of the zeros
// spill: docs/performance/decisions.md#forward-predicated-loads.)
template <int N = config::vec>
__device__ __forceinline__ vector<value_t, N> load_channels_or_zeros(bool present, address_t address) {
    vector<value_t, N> v;
    v.word = decltype(v.word)();
    if (present) v.word = __ldg(reinterpret_cast<const decltype(v.word)*>(address));
    return v;
}

// The same where `present`; elsewhere `word` keeps what it holds.
__device__ __forceinline__ void load_or_keep(uint4& word, int present, address_t address) {
#if MSDA_PTX
    asm("{ .reg .pred p; setp.ne.s32 p, %4, 0; @p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%5]; }"
        : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w) : "r"(present), "l"(address));
#else
    if (present) word = *reinterpret_cast<const uint4*>(address);
#endif
}
__device__ __forceinline__ void load_or_keep(uint2& word, int present, address_t address) {
#if MSDA_PTX
    asm("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.v2.b32 {%0, %1}, [%3]; }"
        : "+r"(word.x), "+r"(word.y) : "r"(present), "l"(address));
#else
    if (present) word = *reinterpret_cast<const uint2*>(address);
#endif
}
__device__ __forceinline__ void load_or_keep(unsigned& word, int present, address_t address) {
#if MSDA_PTX
    asm("{ .reg .pred p; setp.ne.s32 p, %1, 0; @p ld.global.nc.b32 %0, [%2]; }"
        : "+r"(word) : "r"(present), "l"(address));
#else
    if (present) word = *reinterpret_cast<const unsigned*>(address);
#endif
}
__device__ __forceinline__ void load_or_keep(unsigned short& word, int present, address_t address) {
#if MSDA_PTX
    asm("{ .reg .pred p; setp.ne.s32 p, %1, 0; @p ld.global.nc.b16 %0, [%2]; }"
        : "+h"(word) : "r"(present), "l"(address));
#else
    if (present) word = *reinterpret_cast<const unsigned short*>(address);
#endif
}

}  // namespace msda
