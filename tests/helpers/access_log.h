// The log of memory accesses, which finds data races (access_log.cpp). Only a build with ACCESS_LOG has it.
#pragma once

#include <stddef.h>

namespace access_log {

#if defined(ACCESS_LOG)
void watch(const void* array, size_t bytes);        // the next array of the launch, in global memory
void begin_launch(const int* thread, void (*report)(const char*));     // `thread` is the one that runs
void begin_block(const void* shared_memory, size_t bytes, int threads);
void end_launch();
void block_barrier(int line);
void warp_barrier(int warp, int line);
void fence(int line);
void atomic_access(const void* address, size_t bytes, bool integer);
void constant_read(const void* address, size_t bytes);  // through the cache that does not see writes of the launch
#else
inline void watch(const void*, size_t) {}
inline void begin_launch(const int*, void (*)(const char*)) {}
inline void begin_block(const void*, size_t, int) {}
inline void end_launch() {}
inline void block_barrier(int) {}
inline void warp_barrier(int, int) {}
inline void fence(int) {}
inline void atomic_access(const void*, size_t, bool) {}
inline void constant_read(const void*, size_t) {}
#endif

}  // namespace access_log
