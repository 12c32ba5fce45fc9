// What an instruction set implements of attention from region to region.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/regions.h"

namespace permattn::cpu {

// Heads that may lie side by side in the lanes of a vector: 1, 2, 4 or 8.
constexpr int64_t kMaxHeadsAbreast = 8;
constexpr int32_t kNumHeadsAbreast = 4;

// Query regions [first, last) of the heads from m on.
struct RegionTask {
  const RegionParams* params;
  int64_t b, m, first, last;
};

// dQ of query regions [first, last), or dK and dV of key regions [kv_first, kv_last), or both at
// once. What is added to one number, and in which order, does not depend on the cut.
struct RegionBwdTask {
  const RegionBwdParams* params;
  int64_t b, m, first, last, kv_first, kv_last;
  bool wants_dq, wants_dkv;
};

// By log2 of the heads abreast; null where vectors are too short for so many.
struct RegionKernels {
  void (*forward[kNumHeadsAbreast])(const RegionTask& task, std::byte* scratch);
  size_t (*forward_scratch[kNumHeadsAbreast])(const RegionParams& params);
  void (*backward[kNumHeadsAbreast])(const RegionBwdTask& task, std::byte* scratch);
  size_t (*backward_scratch[kNumHeadsAbreast])(const RegionParams& params);
  int64_t lanes;  // that meet the keys at once
};

// Null functions where an instruction set has nothing of its own for the dtype.
RegionKernels portable_region_kernels(Dtype dtype);
#if defined(__x86_64__)
RegionKernels avx2_region_kernels(Dtype dtype);
RegionKernels avx512_region_kernels(Dtype dtype);
RegionKernels avx512_bf16_region_kernels(Dtype dtype);
#endif

}  // namespace permattn::cpu
