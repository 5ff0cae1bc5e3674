// The CUDA thread model on one CPU thread, for the kernels of cuda_src: one fiber per thread, one block after the other.
//
// A fiber runs until it waits at a barrier, at a shuffle or vote of its warp, or ends. The caller chooses the order in
// which fibers run, the schedule, because a missing barrier shows in some orders only. Shared memory is an allocation of
// exactly the launch's bytes, filled with NaN before each block. What the hardware leaves undefined is an error here: a
// barrier that not all threads of the block or warp reach, or reach at different lines; and in a build with the access log
// a data race, in whatever order the fibers run (access_log.cpp).
//
// Schedules, the number `order` of a launch (tests/helpers/schedules.py):
//   0, 1, other     All threads in step: each runs to its next barrier or shuffle, upwards, downwards, or scattered.
//   WARP_BY_WARP +  One warp runs to its next barrier of the block, or to its end, before another warp moves. In it, each
//   256 w + l       lane runs to its next barrier or shuffle before another lane moves. `w` says in which order the warps
//                   run, `l` the lanes: 0 upwards, 1 downwards, 2 + 2 i number i first, 3 + 2 i number i last, the others
//                   upwards.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <type_traits>

#include "access_log.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_LEAVE(save, to) __sanitizer_start_switch_fiber(save, (to)->stack, (to)->stack_size)
#define EMULATOR_ARRIVE(save) __sanitizer_finish_switch_fiber(save, nullptr, nullptr)
#define EMULATOR_BEGIN(from) \
    __sanitizer_finish_switch_fiber(nullptr, (const void**)&(from).stack, &(from).stack_size)
#else
#define EMULATOR_LEAVE(save, to) (void)0
#define EMULATOR_ARRIVE(save) (void)0
#define EMULATOR_BEGIN(from) (void)0
#endif

#define __device__
#define __global__
#if defined(ACCESS_LOG)
#define __forceinline__ __attribute__((always_inline)) inline   // a result that a call leaves in memory is not logged
#else
#define __forceinline__ inline
#endif
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDA_ARCH__ 0
#define MSDA_PTX 0
#define MSDA_SHARED_MEMORY(name) uint4* name = (uint4*)emulator::shared_memory

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct emulator_index { unsigned x, y, z; };

static emulator_index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum { WARP_BY_WARP = 1 << 16 };
enum State { READY, WAITS_FOR_WARP, WAITS_FOR_BLOCK, ENDED };

struct Fiber {
    ucontext_t context;
    void* stack;
    size_t stack_size;
    void* sanitizer_stack;
    State state;
    int line;           // of the barrier it waits at
};

struct Warp {
    int waiting, generation;
    uint64_t slots[2][32];  // one exchange may still be read while the next is written
};

static Fiber* fibers;
static Warp* warps;
static Fiber scheduler;
static unsigned char* shared_memory;
static int threads, current, waiting, votes[2], block_generation, schedule;
static char message[600];
static bool failed;
static void (*kernel)(void*);
static void* kernel_arguments;

inline void fail(const char* what, int line) {
    if (!failed) snprintf(message, sizeof message, "%s (block %u of head %u, thread %d, line %d)", what, blockIdx.x, blockIdx.y, current, line);
    failed = true;
}

inline void yield() {
    Fiber& self = fibers[current];
    EMULATOR_LEAVE(&self.sanitizer_stack, &scheduler);
    swapcontext(&self.context, &scheduler.context);
    EMULATOR_ARRIVE(self.sanitizer_stack);
    threadIdx.x = (unsigned)current;
}

// A data race, or a read of shared memory that nobody has written, ends the launch before the access.
inline void report_race(const char* race) {
    if (!failed) snprintf(message, sizeof message, "%s", race);
    failed = true;
    yield();
}

inline void wait_for_warp(int line, bool orders_memory = false) {
    Warp& warp = warps[current / 32];
    const int first = current / 32 * 32;
    fibers[current].line = line;
    if (++warp.waiting < 32) {
        fibers[current].state = WAITS_FOR_WARP;
        yield();
        return;
    }
    warp.waiting = 0;
    ++warp.generation;
    if (orders_memory) access_log::warp_barrier(current / 32, line);
    for (int t = first; t < first + 32; ++t) {
        if (fibers[t].line != line) fail("lanes of a warp meet at different barriers", line);
        fibers[t].state = READY;
    }
    if (schedule >= WARP_BY_WARP) yield();      // else the last lane before the barrier is the first after it
}

inline void wait_for_block(int line) {
    fibers[current].line = line;
    if (++waiting < threads) {
        fibers[current].state = WAITS_FOR_BLOCK;
        yield();
        return;
    }
    waiting = 0;
    ++block_generation;
    votes[block_generation & 1] = 0;
    access_log::block_barrier(line);
    for (int t = 0; t < threads; ++t) {
        if (fibers[t].line != line) fail("threads of a block meet at different barriers", line);
        fibers[t].state = READY;
    }
    if (schedule >= WARP_BY_WARP) yield();
}

inline bool vote_of_block(bool vote, int line) {
    const int generation = block_generation;
    votes[generation & 1] |= vote;
    wait_for_block(line);
    return votes[generation & 1];
}

template <typename T>
inline T exchange(T x, int source, int line) {
    Warp& warp = warps[current / 32];
    uint64_t* slots = warp.slots[warp.generation & 1];
    slots[current % 32] = 0;
    memcpy(&slots[current % 32], &x, sizeof x);
    wait_for_warp(line);
    T y;
    memcpy(&y, &slots[source], sizeof y);
    return y;
}

template <typename T>
inline unsigned match(T x, int line) {
    Warp& warp = warps[current / 32];
    uint64_t* slots = warp.slots[warp.generation & 1];
    slots[current % 32] = 0;
    memcpy(&slots[current % 32], &x, sizeof x);
    const uint64_t mine = slots[current % 32];
    wait_for_warp(line);
    unsigned same = 0;
    for (int lane = 0; lane < 32; ++lane) same |= (unsigned)(slots[lane] == mine) << lane;
    return same;
}

inline unsigned ballot(bool vote, int line) {
    Warp& warp = warps[current / 32];
    uint64_t* slots = warp.slots[warp.generation & 1];
    slots[current % 32] = vote;
    wait_for_warp(line);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= (unsigned)slots[lane] << lane;
    return votes;
}

// Not logged as a read and a write.
template <typename T>
__attribute__((no_sanitize("thread"))) inline T add(T* p, T x) {
    const T old = *p;
    *p = old + x;
    return old;
}

// The kernels use no other mask than that of all lanes.
inline void all_lanes(unsigned long long mask, int line) {
    if (mask != 0xffffffffull) fail("a mask without some lanes of the warp", line);
}

inline void body() {
    EMULATOR_BEGIN(scheduler);
    threadIdx.x = (unsigned)current;
    kernel(kernel_arguments);
    fibers[current].state = ENDED;
    EMULATOR_LEAVE(nullptr, &scheduler);
    swapcontext(&fibers[current].context, &scheduler.context);
}

// The thread that runs next after `turn` others, with all threads in step.
inline int turn_of(int turn) {
    if (schedule == 0) return turn;
    if (schedule == 1) return threads - 1 - turn;
    return (int)(((unsigned)turn * 2654435761u + (unsigned)schedule * 40503u) % (unsigned)threads);
}

// Which of `count` warps or lanes runs after `turn` others, by `rule`: 0, 1, 2 + 2 i or 3 + 2 i.
inline int turn_by(int rule, int turn, int count) {
    if (rule < 2) return rule == 0 ? turn : count - 1 - turn;
    const int one = (rule - 2) / 2 % count;
    if (rule % 2 == 0) return turn == 0 ? one : turn - (turn <= one);
    return turn == count - 1 ? one : turn + (turn >= one);
}

// Runs a thread to its next barrier or shuffle. Returns whether it was ready to run.
inline bool run_thread(int thread) {
    current = thread;
    if (failed || fibers[thread].state != READY) return false;
    EMULATOR_LEAVE(&scheduler.sanitizer_stack, &fibers[thread]);
    swapcontext(&scheduler.context, &fibers[thread].context);
    EMULATOR_ARRIVE(scheduler.sanitizer_stack);
    return true;
}

inline bool run_all_in_step() {
    bool ran = false;
    for (int turn = 0; turn < threads; ++turn) ran |= run_thread(turn_of(turn));
    return ran;
}

// Until all warps wait or have ended, or a barrier of the block is over and the first warp is the next.
inline bool run_warp_by_warp() {
    const int rule = schedule - WARP_BY_WARP, generation = block_generation;
    bool ran = false;
    for (int turn = 0; turn < threads / 32; ++turn)
        for (bool moves = true; moves;) {
            const int first = turn_by(rule / 256, turn, threads / 32) * 32;
            moves = false;
            for (int lane = 0; lane < 32 && generation == block_generation; ++lane)
                moves |= run_thread(first + turn_by(rule % 256, lane, 32));
            ran |= moves;
        }
    return ran;
}

inline void run_block() {
    for (int t = 0; t < threads; ++t) {
        getcontext(&fibers[t].context);
        fibers[t].context.uc_stack.ss_sp = fibers[t].stack;
        fibers[t].context.uc_stack.ss_size = fibers[t].stack_size;
        fibers[t].context.uc_link = nullptr;
        fibers[t].state = READY;
        makecontext(&fibers[t].context, body, 0);
    }
    memset(warps, 0, sizeof(Warp) * (size_t)(threads / 32));
    waiting = votes[0] = votes[1] = 0;
    for (;;) {
        const bool ran = schedule < WARP_BY_WARP ? run_all_in_step() : run_warp_by_warp();
        bool all_ended = true;
        for (int t = 0; t < threads; ++t) all_ended = all_ended && fibers[t].state == ENDED;
        if (failed || all_ended) return;
        if (ran) continue;
        for (int t = 0; t < threads && !failed; ++t)
            if (fibers[t].state != ENDED) current = t, fail("a barrier that not all threads reach", fibers[t].line);
        return;
    }
}

// Returns null, or what went wrong.
inline const char* launch(void (*entry)(void*), void* arguments, const long long* grid, int block, size_t shared, int order) {
    failed = false;
    threads = block;
    schedule = order;
    access_log::begin_launch(&current, report_race);
    kernel = entry;
    kernel_arguments = arguments;
    gridDim.x = (unsigned)grid[0], gridDim.y = (unsigned)grid[1], gridDim.z = (unsigned)grid[2];
    blockDim.x = (unsigned)block;
    fibers = (Fiber*)calloc((size_t)block, sizeof(Fiber));
    warps = (Warp*)calloc((size_t)block / 32, sizeof(Warp));
    const size_t stack_size = 128 << 10;
    for (int t = 0; t < block; ++t) {
        fibers[t].stack = malloc(stack_size);
        fibers[t].stack_size = stack_size;
    }
    for (long long b = 0; b < grid[0] * grid[1] * grid[2] && !failed; ++b) {
        blockIdx.x = (unsigned)(b % grid[0]);
        blockIdx.y = (unsigned)(b / grid[0] % grid[1]);
        blockIdx.z = (unsigned)(b / grid[0] / grid[1]);
        // Exactly the launch's bytes, so that an access beyond them is seen.
        if (posix_memalign((void**)&shared_memory, 16, shared ? shared : 1)) abort();
        memset(shared_memory, 0xff, shared);
        access_log::begin_block(shared_memory, shared, block);
        run_block();
        free(shared_memory);
    }
    access_log::end_launch();
    for (int t = 0; t < block; ++t) free(fibers[t].stack);
    free(fibers);
    free(warps);
    return failed ? message : nullptr;
}

}  // namespace emulator

#define __syncthreads() emulator::wait_for_block(__LINE__)
#define __syncthreads_or(vote) emulator::vote_of_block(vote, __LINE__)
#define __syncwarp() emulator::wait_for_warp(__LINE__, true)
#define __all_sync(mask, vote) (emulator::all_lanes(mask, __LINE__), emulator::ballot(vote, __LINE__) == 0xffffffffu)
#define __match_any_sync(mask, x) (emulator::all_lanes(mask, __LINE__), emulator::match(x, __LINE__))
#define __ballot_sync(mask, vote) (emulator::all_lanes(mask, __LINE__), emulator::ballot(vote, __LINE__))
#define __ffs(x) __builtin_ffs(x)
#define __popc(x) __builtin_popcount(x)
#define __shfl_xor_sync(mask, x, lanes) \
    (emulator::all_lanes(mask, __LINE__), emulator::exchange(x, (emulator::current % 32) ^ (lanes), __LINE__))
#define __shfl_sync(mask, x, lane) (emulator::all_lanes(mask, __LINE__), emulator::exchange(x, (lane), __LINE__))
#define __shfl_up_sync(mask, x, by) \
    (emulator::all_lanes(mask, __LINE__), emulator::exchange(x, \
        emulator::current % 32 < (by) ? emulator::current % 32 : emulator::current % 32 - (by), __LINE__))

// These are part of their caller, so that the access log names its line.
#define CUDA_FUNCTION template <typename T> __attribute__((always_inline)) inline
CUDA_FUNCTION T __ldg(const T* p) {
    access_log::constant_read(p, sizeof(T));
    return *p;
}
CUDA_FUNCTION T __ldcg(const T* p) { return *p; }
CUDA_FUNCTION T __ldcs(const T* p) { return *p; }
CUDA_FUNCTION void __stcs(T* p, T x) { *p = x; }
CUDA_FUNCTION T atomicAdd(T* p, T x) {
    access_log::atomic_access(p, sizeof x, std::is_integral<T>::value);
    return emulator::add(p, x);
}
#define __threadfence() access_log::fence(__LINE__)
inline float __int2float_rz(int x) { return (double)(float)x > x ? nextafterf((float)x, 0) : (float)x; }     // x >= 0
inline float __fmul_rn(float x, float y) { volatile float product = x * y; return product; }
inline double __dmul_rn(double x, double y) { volatile double product = x * y; return product; }
inline int __float2int_rd(float x) {
    if (!(x == x)) return 0;
    return x >= 2147483648.0f ? 2147483647 : x < -2147483648.0f ? (-2147483647 - 1) : (int)__builtin_floorf(x);
}
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline unsigned max(unsigned x, unsigned y) { return x > y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
inline long long max(long long x, long long y) { return x > y ? x : y; }
inline unsigned min(unsigned x, unsigned y) { return x < y ? x : y; }
inline int min(int x, int y) { return x < y ? x : y; }
inline long long min(long long x, long long y) { return x < y ? x : y; }
inline unsigned long long min(unsigned long long x, unsigned long long y) { return x < y ? x : y; }
