// Small kernels that test the stand-in itself: one with faults to plant, and bare instructions.
#pragma once
#include <array>
#include <string>
#include <vector>

#include "cuda/primitives/memory.cuh"
#include "cuda/primitives/mma.cuh"
#include "cuda/primitives/numbers.cuh"

namespace fixtures {

namespace ptx = permattn::ptx;

enum Fault : int {
  kNone,
  kNoWait,          // reads before the copy is waited for
  kNoFirstSync,     // reads what another thread copies, without a barrier
  kNoSecondSync,    // overwrites what another thread still reads
  kMisaligned,      // one thread copies to an odd address
  kOutside,         // copies past the end of shared memory
  kInFlight,        // ends with a copy under way
  kTwoCollectives,  // lanes of a warp in different collectives
  kMissedBarrier,   // a thread that waits at a collective while the others stand at the barrier
};

constexpr int kThreads = 64, kRounds = 4;

// Every thread copies its 16 bytes of each round and adds up those of its neighbour.
PERMATTN_GLOBAL void rotate_kernel(const int32_t* in, int32_t* out, int fault) {
  PERMATTN_DYNAMIC_SHARED(shared);
  const auto thread = static_cast<int>(threadIdx.x);
  const int neighbour = (thread + 33) % kThreads;
  int32_t sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    char* to = shared + 16 * thread + (fault == kMisaligned && thread == 5 ? 4 : 0);
    if (fault == kOutside) to += 16;
    ptx::cp_async_16(to, in + 4 * (round * kThreads + thread), 16);
    ptx::cp_async_commit();
    if (fault != kNoWait && fault != kInFlight) ptx::cp_async_wait<0>();
    if (fault != kNoFirstSync) __syncthreads();
    if (fault == kTwoCollectives && thread == 5) __syncwarp();
    if (fault == kMissedBarrier && thread == 5) ptx::ballot(true);
    if (ptx::ballot(thread >= 0) != ~0U) sum = 0;
    sum += reinterpret_cast<const int32_t*>(shared + 16 * neighbour)[0];
    if (fault != kNoSecondSync) __syncthreads();
  }
  out[thread] = sum;
}

inline std::vector<int32_t> rotate(int fault) {
  alignas(16) static int32_t in[4 * kRounds * kThreads];
  for (int i = 0; i < 4 * kRounds * kThreads; ++i) in[i] = i * i % 1009;
  std::vector<int32_t> out(kThreads, -1);
  shim::launch(1, kThreads, 16 * kThreads, [&] { rotate_kernel(in, out.data(), fault); });
  return out;
}

using Words = std::vector<std::vector<uint32_t>>;  // [32 lanes][words]

// c = a b of one warp, as words.
inline Words product(const std::string& name, const Words& a, const Words& b) {
  Words c(32, std::vector<uint32_t>(4));
  shim::launch(1, 32, 16, [&] {
    const auto lane = static_cast<unsigned>(threadIdx.x);
    uint32_t a_words[4], b_words[2];
    std::copy_n(a[lane].begin(), 4, a_words);
    std::copy_n(b[lane].begin(), 2, b_words);
    float sums[4] = {};
    int32_t counts[4] = {};
    if (name == "bf16") ptx::mma_bf16(sums, a_words, b_words);
    if (name == "f16") ptx::mma_f16(sums, a_words, b_words);
    if (name == "e4m3") ptx::mma_e4m3(sums, a_words, b_words);
    if (name == "s8") ptx::mma_s8(counts, a_words, b_words);
    if (name == "u8s8") ptx::mma_u8s8(counts, a_words, b_words);
    if (name == "s4") ptx::mma_s4(counts, a_words, b_words);
    if (name == "u4s4") ptx::mma_u4s4(counts, a_words, b_words);
    const bool is_float = name == "bf16" || name == "f16" || name == "e4m3";
    std::memcpy(c[lane].data(), is_float ? static_cast<void*>(sums) : counts, 16);
  });
  return c;
}

// Words of every lane: row i of the 32 rows of 16 bytes has bytes 16 i to 16 i + 15.
inline Words load_matrices(bool transposed) {
  Words result(32, std::vector<uint32_t>(4));
  shim::launch(1, 32, 512, [&] {
    char* shared = shim::dynamic_shared();
    const auto lane = static_cast<unsigned>(threadIdx.x);
    for (unsigned i = 0; i < 16; ++i) shared[16 * lane + i] = static_cast<char>(16 * lane + i);
    __syncwarp();
    uint32_t words[4];
    if (transposed) {
      ptx::ldmatrix_x4<true>(words, shared + 16 * lane);
    } else {
      ptx::ldmatrix_x4<false>(words, shared + 16 * lane);
    }
    std::copy_n(words, 4, result[lane].begin());
  });
  return result;
}

}  // namespace fixtures
