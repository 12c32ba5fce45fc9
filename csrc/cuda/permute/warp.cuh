// What lanes of a warp and threads of a block tell each other, in whole numbers.
#pragma once
#include <cstdint>

#include "../primitives/platform.cuh"
#if !defined(__CUDACC__)
#include <atomic>
#endif

namespace permattn::permute {

#if defined(__CUDACC__)

// The value of lane (own ^ mask), of all 32 lanes.
template <class T>
PERMATTN_DEVICE T shuffle_xor(T value, int32_t mask) {
  return __shfl_xor_sync(~0U, value, mask);
}
// The value of lane (lane modulo 32).
PERMATTN_DEVICE int32_t shuffle_from(int32_t value, int32_t lane) {
  return __shfl_sync(~0U, value, lane);
}
// The value of lane (own - step); the own one where there is none.
PERMATTN_DEVICE int32_t shuffle_up(int32_t value, int32_t step) {
  return __shfl_up_sync(~0U, value, step);
}
// In any order: the largest of whole numbers, their sum and the union of their bits are the same.
PERMATTN_DEVICE void raise_to(uint32_t* to, uint32_t value) { atomicMax(to, value); }
PERMATTN_DEVICE void join_bits(uint32_t* to, uint32_t value) { atomicOr(to, value); }
PERMATTN_DEVICE void add_to(uint32_t* to, uint32_t value) { atomicAdd(to, value); }
PERMATTN_DEVICE int32_t count_bits(uint32_t x) { return __popc(x); }

#else

template <class T>
T shuffle_xor(T value, int32_t mask) {
  return shim::exchange(value, shim::block->current->lane ^ mask);
}
inline int32_t shuffle_from(int32_t value, int32_t lane) {
  return shim::exchange(value, lane & 31);
}
inline int32_t shuffle_up(int32_t value, int32_t step) {
  const int32_t own = shim::block->current->lane;
  return shim::exchange(value, own < step ? own : own - step);
}
inline void raise_to(uint32_t* to, uint32_t value) {
  const std::atomic_ref<uint32_t> place(*to);
  uint32_t was = place.load(std::memory_order_relaxed);
  while (was < value && !place.compare_exchange_weak(was, value, std::memory_order_relaxed)) {
  }
}
inline void join_bits(uint32_t* to, uint32_t value) {
  std::atomic_ref<uint32_t>(*to).fetch_or(value, std::memory_order_relaxed);
}
inline void add_to(uint32_t* to, uint32_t value) {
  std::atomic_ref<uint32_t>(*to).fetch_add(value, std::memory_order_relaxed);
}
inline int32_t count_bits(uint32_t x) { return __builtin_popcount(x); }

#endif

PERMATTN_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }

}  // namespace permattn::permute
