// What the checker of races hears of a launch (replay/checker.cpp); nothing where it is not built
// in.
#pragma once
#include <cstddef>
#include <cstdint>

namespace shim::observe {

#if defined(PERMATTN_SHIM_CHECKED)

// Global memory whose accesses count. What is not defined must be written before it is read.
void add_region(const void* begin, size_t bytes, bool is_defined);
// Faults so far; the first ones are told on stderr.
int32_t faults();

void launch_begins();
void block_begins(int32_t block, int32_t threads, const char* shared, size_t shared_bytes);
void block_ends();

// The thread that goes on; -1: none, what runs is the stand-in itself.
void goes_on(int32_t thread);

// All threads of the block, or of a warp, have met.
void threads_met();
void lanes_met(int32_t warp);

// Of the thread that goes on, by an instruction that the stand-in carries out.
void reads(const void* from, size_t bytes);
// A copy of 16 bytes, from when it is asked for until it is waited for.
void copy_begins(const void* to, const void* from, size_t bytes_read);
void copy_ends(const void* to);

#else

inline void add_region(const void*, size_t, bool) {}
inline int32_t faults() { return 0; }
inline void launch_begins() {}
inline void block_begins(int32_t, int32_t, const char*, size_t) {}
inline void block_ends() {}
inline void goes_on(int32_t) {}
inline void threads_met() {}
inline void lanes_met(int32_t) {}
inline void reads(const void*, size_t) {}
inline void copy_begins(const void*, const void*, size_t) {}
inline void copy_ends(const void*) {}

#endif

}  // namespace shim::observe
