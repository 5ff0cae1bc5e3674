// A detector of data races for the emulator. g++ compiles the kernel with -fsanitize=thread, which calls a function before
// each access to memory. Those functions are here, instead of the sanitizer's library, which knows no blocks and warps.
//
// Two accesses to a byte of shared or global memory are a race if different threads make them, at least one writes, not both
// are atomic, and they are not ordered. What orders them, as in CUDA:
// - Two threads of a block: a barrier of the block between the accesses.
// - Two lanes of a warp: __syncwarp() between them. It names all lanes here. Shuffles, votes and matches order nothing.
// - Two blocks, or two warps: access, fence, atomic addition to an integer in the one; in the other, later, an atomic
//   addition to the same integer, fence, access. These may be of several threads of a block, with a barrier of the block
//   between one and the next, or of a warp between fence and addition. Otherwise blocks are concurrent, though the emulator
//   runs them one after the other.
//
// A read of shared memory that no thread of the block has written is reported, too: a barrier may be missing before it.
// The log does not depend on the order in which the emulator runs the threads, as long as they take the same branches.
#define ACCESS_LOG
#include "access_log.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <map>
#include <set>
#include <vector>

// Of an access by thread `thread` of block `block`: how often the block, its warp and the thread itself had synchronised.
struct Moment {
    uint32_t block;     // from 1 on; 0: there is none
    uint32_t block_barriers, warp_barriers;
    uint32_t code;      // address of the instruction
    uint16_t thread, fences;
};

// Enough of all reads of a byte, or of all atomic accesses to it, to know whether one of them is not ordered before another
// access: those of the newest block, since its last barrier, and one of a block before.
struct Accesses {
    Moment newest, other_lane, other_warp, other_block;

    void add(const Moment& now);
};

// A byte. A write that is no race comes after everything before it.
struct Cell {
    Moment write;
    Accesses reads, atomics;
    bool constant;      // some thread has read it by __ldg
};

// An atomic addition that other blocks may see, and the accesses of its block that a fence puts before it: those before
// block barrier number `block_barriers`, and those of each thread before its fence number `fences`.
struct Release {
    uint32_t block, block_barriers;
    std::vector<uint16_t> fences;
};

// How many atomic additions to each integer came before.
using Additions = std::map<const void*, size_t>;

struct Region {
    const char* begin;
    size_t bytes;
    Cell* cells;
};

static const char *lowest = (const char*)UINTPTR_MAX, *highest;     // of all regions
static std::vector<Region> arrays;
static Region shared;
static const int* running;
static void (*report)(const char*);

static std::set<int> reached;       // lines of barriers and fences

static uint32_t block, block_barriers;
static int threads;
static bool synchronises;                   // with other blocks: the block has had a fence or an atomic addition
static std::vector<uint32_t> warp_barriers;
// Of each thread: how many fences it has had, how many before the last barrier of the block, and of its warp, and the block
// barrier of the last one.
static std::vector<uint16_t> fences, fences_before_barrier, fences_before_warp_barrier;
static std::vector<uint32_t> barrier_of_last_fence;
static uint32_t barrier_of_any_fence;

static std::map<const void*, std::vector<Release>> releases;
// What each thread has seen by atomic additions of its own, and after a fence; at [threads] what the whole block has.
static std::vector<Additions> seen, acquired;

// ---- order ---------------------------------------------------------------------------------------------------

static void merge(Additions& target, const Additions& source) {
    for (const auto& [integer, count] : source) target[integer] = std::max(target[integer], count);
}

static bool is_released(const Moment& before, const Additions& by) {
    for (const auto& [integer, count] : by)
        for (size_t i = 0; i < count; ++i) {
            const Release& release = releases[integer][i];
            if (release.block != before.block) continue;
            if (before.block_barriers < release.block_barriers || before.fences < release.fences[before.thread]) return true;
        }
    return false;
}

static bool is_ordered(const Moment& before, const Moment& now) {
    if (before.block == 0) return true;
    if (before.block != now.block)
        return synchronises && (is_released(before, acquired[now.thread]) || is_released(before, acquired[threads]));
    if (before.thread == now.thread || before.block_barriers != now.block_barriers) return true;
    if (before.thread / 32 == now.thread / 32 && before.warp_barriers != now.warp_barriers) return true;
    return synchronises && is_released(before, acquired[now.thread]);
}

void Accesses::add(const Moment& now) {
    if (newest.block != now.block) {
        *this = {now, {}, {}, newest.block ? newest : other_block};
    } else if (newest.block_barriers != now.block_barriers) {
        *this = {now, {}, {}, other_block};
    } else if (newest.thread / 32 != now.thread / 32) {
        other_warp = now;
    } else {
        if (newest.warp_barriers != now.warp_barriers) other_lane = {};
        else if (newest.thread != now.thread) other_lane = newest;
        newest = now;
    }
}

// ---- accesses ------------------------------------------------------------------------------------------------

enum Kind { READ, WRITE, ATOMIC };
static const char* const names[] = {"read", "write", "atomic addition"};

static void report_race(const Region& region, size_t byte, Kind kind, const Moment& before, Kind kind_now, const Moment& now) {
    char place[64], text[400];
    if (&region == &shared) snprintf(place, sizeof place, "shared memory");
    else snprintf(place, sizeof place, "array %d", (int)(&region - arrays.data()));
    snprintf(text, sizeof text,
             "data race on byte %zu of %s: %s by thread %u of block %u at code %#x, "
             "%s by thread %u of block %u at code %#x, and nothing orders them",
             byte, place, names[kind], before.thread, before.block - 1, before.code, names[kind_now], now.thread,
             now.block - 1, now.code);
    report(text);
}

struct Access {
    const Region& region;
    size_t byte;
    Kind kind;
    const Moment& now;

    void report_unwritten() const {
        char text[200];
        snprintf(text, sizeof text, "%s of byte %zu of shared memory, which nothing has written, by thread %u of block %u "
                 "at code %#x", names[kind], byte, now.thread, now.block - 1, now.code);
        report(text);
    }

    void check(const Moment& before, Kind other) const {
        if (!is_ordered(before, now)) report_race(region, byte, other, before, kind, now);
    }

    void check(const Accesses& accesses, Kind other) const {
        if (accesses.newest.block == 0) return;
        check(accesses.newest, other);
        check(accesses.other_lane, other);
        check(accesses.other_warp, other);
        check(accesses.other_block, other);
    }
};

static void report_constant(const Region& region, size_t byte) {
    char text[200];
    snprintf(text, sizeof text, "byte %zu of array %d is read by __ldg and written in the same launch", byte,
             (int)(&region - arrays.data()));
    report(text);
}

static const Region* region_of(const char* address) {
    if (address < lowest || address >= highest) return nullptr;
    if ((size_t)(address - shared.begin) < shared.bytes) return &shared;
    for (const Region& array : arrays)
        if ((size_t)(address - array.begin) < array.bytes) return &array;
    return nullptr;
}

static void log(const void* address, size_t bytes, Kind kind, const void* code) {
    const Region* region = region_of((const char*)address);
    if (!region) return;
    const int thread = *running;
    const Moment now = {block, block_barriers, warp_barriers[thread / 32], (uint32_t)(uintptr_t)code, (uint16_t)thread,
                        fences[thread]};
    const size_t first = (const char*)address - region->begin;
    for (size_t byte = first; byte < std::min(first + bytes, region->bytes); ++byte) {
        Cell& cell = region->cells[byte];
        const Access access = {*region, byte, kind, now};
        if (kind != WRITE && region == &shared && !cell.write.block && !cell.atomics.newest.block) access.report_unwritten();
        access.check(cell.write, WRITE);
        if (kind != READ && cell.constant) report_constant(*region, byte);
        if (kind != READ) access.check(cell.reads, READ);
        if (kind != ATOMIC) access.check(cell.atomics, ATOMIC);
        if (kind == READ) cell.reads.add(now);
        else if (kind == ATOMIC) cell.atomics.add(now);
        else cell = {now, {}, {}};
    }
}

// ---- what the emulator calls ---------------------------------------------------------------------------------

namespace access_log {

static Region region(const void* begin, size_t bytes) {
    lowest = std::min(lowest, (const char*)begin);
    highest = std::max(highest, (const char*)begin + bytes);
    return {(const char*)begin, bytes, (Cell*)calloc(bytes ? bytes : 1, sizeof(Cell))};
}

void constant_read(const void* address, size_t bytes) {
    const Region* region = region_of((const char*)address);
    if (!region) return;
    const size_t first = (const char*)address - region->begin;
    for (size_t byte = first; byte < std::min(first + bytes, region->bytes); ++byte) {
        Cell& cell = region->cells[byte];
        if (cell.write.block || cell.atomics.newest.block) report_constant(*region, byte);
        cell.constant = true;
    }
}

void watch(const void* array, size_t bytes) { arrays.push_back(region(array, bytes)); }

void begin_launch(const int* thread, void (*to)(const char*)) {
    running = thread;
    report = to;
    block = 0;
}

void begin_block(const void* shared_memory, size_t bytes, int block_threads) {
    free(shared.cells);
    shared = region(shared_memory, bytes);
    ++block;
    block_barriers = barrier_of_any_fence = 0;
    threads = block_threads;
    synchronises = false;
    warp_barriers.assign(threads / 32, 0);
    fences.assign(threads, 0);
    fences_before_barrier.assign(threads, 0);
    fences_before_warp_barrier.assign(threads, 0);
    barrier_of_last_fence.assign(threads, 0);
    seen.assign(threads + 1, {});
    acquired.assign(threads + 1, {});
}

// Prints the lines of the barriers and fences that the launch has reached.
void end_launch() {
    for (int line : reached) printf("%d\n", line);
    reached.clear();
    for (const Region& array : arrays) free(array.cells);
    free(shared.cells);
    shared = {};
    arrays.clear();
    releases.clear();
    lowest = (const char*)UINTPTR_MAX;
    highest = nullptr;
}

void warp_barrier(int warp, int line) {
    reached.insert(line);
    ++warp_barriers[warp];
    if (synchronises) std::copy_n(fences.begin() + 32 * warp, 32, fences_before_warp_barrier.begin() + 32 * warp);
}

void block_barrier(int line) {
    reached.insert(line);
    ++block_barriers;
    if (!synchronises) return;
    fences_before_barrier = fences;
    for (int t = 0; t < threads; ++t) {
        barrier_of_any_fence = std::max(barrier_of_any_fence, barrier_of_last_fence[t]);
        merge(seen[threads], seen[t]);
        merge(acquired[threads], acquired[t]);
    }
}

void fence(int line) {
    reached.insert(line);
    const int thread = *running;
    synchronises = true;
    ++fences[thread];
    barrier_of_last_fence[thread] = block_barriers;
    merge(acquired[thread], seen[thread]);
    merge(acquired[thread], seen[threads]);
}

void atomic_access(const void* address, size_t bytes, bool integer) {
    log(address, bytes, ATOMIC, __builtin_return_address(0));
    const Region* region = region_of((const char*)address);
    if (!integer || !region || region == &shared) return;
    const int thread = *running;
    synchronises = true;
    std::vector<Release>& additions = releases[address];
    seen[thread][address] = additions.size();
    Release release = {block, std::max(barrier_of_any_fence, barrier_of_last_fence[thread]), fences_before_barrier};
    for (int t = thread / 32 * 32; t < thread / 32 * 32 + 32; ++t)
        release.fences[t] = std::max(release.fences[t], fences_before_warp_barrier[t]);
    release.fences[thread] = fences[thread];
    additions.push_back(release);
}

}  // namespace access_log

// ---- what the compiled kernel calls --------------------------------------------------------------------------

#define HOOK extern "C" void
#define ACCESSES(bytes) \
    HOOK __tsan_read##bytes(void* p) { log(p, bytes, READ, __builtin_return_address(0)); } \
    HOOK __tsan_write##bytes(void* p) { log(p, bytes, WRITE, __builtin_return_address(0)); } \
    HOOK __tsan_unaligned_read##bytes(void* p) { log(p, bytes, READ, __builtin_return_address(0)); } \
    HOOK __tsan_unaligned_write##bytes(void* p) { log(p, bytes, WRITE, __builtin_return_address(0)); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
HOOK __tsan_read_range(void* p, size_t bytes) { log(p, bytes, READ, __builtin_return_address(0)); }
HOOK __tsan_write_range(void* p, size_t bytes) { log(p, bytes, WRITE, __builtin_return_address(0)); }
HOOK __tsan_vptr_update(void**, void*) {}
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
