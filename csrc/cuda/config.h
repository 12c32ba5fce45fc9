// Tile choice: one pure function from the facts of a problem to the shape of a kernel. Host only in
// use, compiled anywhere; tests sweep it.
#pragma once
#include <cstdint>

#include "../common/params.h"
#include "../common/quant.h"

namespace permattn::cuda {

// Kernels are written once per family of instructions.
enum class Family : int32_t { kSm80 = 0, kSm90 = 1 };

struct Shape {
  int32_t capability;  // major * 10 + minor
  Dtype dtype;         // of v and out
  Format qk, pv;
  int32_t head_dim, head_dim_v;
  int32_t unit;      // slots that share one list
  int32_t block_kv;  // greatest common divisor of the parts' key blocks
  int32_t q_rows, kv_rows;
};

struct Config {
  Family family;
  int32_t dim;  // 64, 96, 128 or 256: both head dims are padded to it
  int32_t block_m, block_n;
  int32_t warps;  // that multiply; sm90 adds a warpgroup of producers
  int32_t stages;
  Format qk, pv;  // as computed: int4 is int8 where the hardware has no int4 product
};

// Least width of a kernel that could take a head dim; 0: there is none.
constexpr int32_t padded_dim(int32_t head_dim) {
  return head_dim <= 64    ? 64
         : head_dim <= 96  ? 96
         : head_dim <= 128 ? 128
         : head_dim <= 256 ? 256
                           : 0;
}

// Why there is no kernel for a shape; null where there is one.
const char* why_not(const Shape& shape);

// Only for shapes that have a kernel.
Config select_config(const Shape& shape);

// AttentionArgs::tiles_per_item: sm90 kernels always take 128 queries, as one tile or as two.
constexpr int32_t tiles_per_item(const Config& config) {
  return config.family == Family::kSm90 && config.block_m == 64 ? 2 : 1;
}

// Shared memory that a block may have, in bytes.
constexpr int64_t shared_limit(int32_t capability) {
  const bool is_small =
      capability == 86 || capability == 89 || capability == 120 || capability == 121;
  return is_small ? 99 * 1024 : capability >= 90 ? 227 * 1024 : 163 * 1024;
}

}  // namespace permattn::cuda
