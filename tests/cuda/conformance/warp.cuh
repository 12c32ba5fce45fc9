// Bare instructions of a warp, on given bits: what a device answers, the stand-in and the simulator
// have to answer too. One block; `in` and `out` are words.
#pragma once
#include "cuda/primitives/memory.cuh"
#include "cuda/primitives/mma.cuh"
#include "cuda/primitives/numbers.cuh"

namespace conformance {

namespace ptx = permattn::ptx;

constexpr int kRounds = 8;     // of products
constexpr int kPerThread = 8;  // numbers

// Sums that go through memory as words.
PERMATTN_DEVICE uint32_t word_of(float x) { return ptx::bits_of(x); }
PERMATTN_DEVICE uint32_t word_of(int32_t x) { return static_cast<uint32_t>(x); }
PERMATTN_DEVICE void from_word(float& x, uint32_t word) { x = ptx::float_from_bits(word); }
PERMATTN_DEVICE void from_word(int32_t& x, uint32_t word) { x = static_cast<int32_t>(word); }

// Of every round and lane: four words of a, two of b, four of c. Out: c + a b.
template <class Number, class Multiply>
PERMATTN_DEVICE void products(const uint32_t* in, uint32_t* out, Multiply multiply) {
  const auto lane = static_cast<int>(threadIdx.x);
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t* mine = in + 10 * (32 * round + lane);
    uint32_t a[4], b[2];
    Number c[4];
    for (int i = 0; i < 4; ++i) a[i] = mine[i];
    for (int i = 0; i < 2; ++i) b[i] = mine[4 + i];
    for (int i = 0; i < 4; ++i) from_word(c[i], mine[6 + i]);
    multiply(c, a, b);
    for (int i = 0; i < 4; ++i) out[4 * (32 * round + lane) + i] = word_of(c[i]);
  }
}

// 32 rows of 16 bytes, as four matrices.
template <bool kTransposed>
PERMATTN_DEVICE void load_matrices(const uint32_t* in, uint32_t* out) {
  PERMATTN_DYNAMIC_SHARED(shared);
  const auto lane = static_cast<int>(threadIdx.x);
  auto* rows = reinterpret_cast<uint32_t*>(shared);
  for (int i = 0; i < 4; ++i) rows[4 * lane + i] = in[4 * lane + i];
  __syncthreads();
  uint32_t words[4];
  ptx::ldmatrix_x4<kTransposed>(words, shared + 16 * lane);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = words[i];
}

// Lane i copies its first i % 17 bytes; what lies behind them is zero.
PERMATTN_DEVICE void copy_with_zeros(const uint32_t* in, uint32_t* out) {
  PERMATTN_DYNAMIC_SHARED(shared);
  const auto lane = static_cast<int>(threadIdx.x);
  ptx::cp_async_16(shared + 16 * lane, in + 4 * lane, lane % 17);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  const auto* rows = reinterpret_cast<const uint32_t*>(shared);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = rows[4 * lane + i];
}

template <class Convert>
PERMATTN_DEVICE void numbers(const uint32_t* in, uint32_t* out, Convert convert) {
  for (int i = 0; i < kPerThread; ++i) {
    const int at = kPerThread * static_cast<int>(threadIdx.x) + i;
    out[at] = ptx::bits_of(convert(ptx::float_from_bits(in[at])));
  }
}

// Four numbers a thread into two words, or into one that is there twice.
template <class Pack>
PERMATTN_DEVICE void packed(const uint32_t* in, uint32_t* out, Pack pack) {
  const auto thread = static_cast<int>(threadIdx.x);
  float x[4];
  for (int i = 0; i < 4; ++i) x[i] = ptx::float_from_bits(in[4 * thread + i]);
  for (int i = 0; i < 2; ++i) out[2 * thread + i] = pack(x, i);
}

}  // namespace conformance
