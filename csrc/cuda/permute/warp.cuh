// What lanes of a warp and threads of a block tell each other, in whole numbers.
#pragma once
#include <cstdint>

#include "../primitives/platform.cuh"

namespace permattn::permute {

#if defined(__CUDACC__)

// The value of lane (own ^ mask), of all 32 lanes.
template <class T>
PERMATTN_DEVICE T shuffle_xor(T value, int32_t mask) {
  return __shfl_xor_sync(~0U, value, mask);
}
PERMATTN_DEVICE int32_t shuffle_from(int32_t value, int32_t lane) {
  return __shfl_sync(~0U, value, lane);
}
// In any order: the largest of whole numbers, their sum and the union of their bits are the same.
PERMATTN_DEVICE void raise_to(uint32_t* to, uint32_t value) { atomicMax(to, value); }
PERMATTN_DEVICE void join_bits(uint32_t* to, uint32_t value) { atomicOr(to, value); }
PERMATTN_DEVICE int32_t count_bits(uint32_t x) { return __popc(x); }

#else

template <class T>
T shuffle_xor(T value, int32_t mask) {
  return shim::exchange(value, shim::block->current->lane ^ mask);
}
inline int32_t shuffle_from(int32_t value, int32_t lane) { return shim::exchange(value, lane); }
inline void raise_to(uint32_t* to, uint32_t value) { *to = *to < value ? value : *to; }
inline void join_bits(uint32_t* to, uint32_t value) { *to |= value; }
inline int32_t count_bits(uint32_t x) { return __builtin_popcount(x); }

#endif

PERMATTN_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }

}  // namespace permattn::permute
