// Shapes of the kernels of this family: one pure function of what a kernel multiplies, which the
// host's choice and the kernels themselves both read.
#pragma once
#include <cstdint>

#include "../../common/quant.h"

namespace permattn::sm90 {

// Two warpgroups multiply, 64 queries each; a third one feeds them.
constexpr int32_t kHalves = 2;
constexpr int32_t kHalfRows = 64;
constexpr int32_t kThreads = 384;

struct TileShape {
  int32_t block_n;  // keys of a tile; 0: there is no such kernel
  int32_t stages;   // tiles of K and V in shared memory
  // Q as operand from registers: half as many bytes of shared memory for small tiles of keys.
  bool q_in_registers;
  int32_t feed_registers, math_registers;  // of a thread; together with the other half 504
};

// Of kernels for tiles of `block_n` (64 or 128) keys.
constexpr TileShape tile_shape(Format qk, Format pv, int32_t dim, int32_t block_n) {
  constexpr TileShape kNone{};
  if (qk == Format::kInt4 || pv == Format::kInt4) return kNone;
  if (qk == Format::kNone && pv != Format::kNone) return kNone;
  if (qk != Format::kNone) {
    if (block_n != 64 || dim > 128) return kNone;
    return {64, 6, true, 72, 216};
  }
  if (dim == 256) return block_n == 64 ? TileShape{64, 2, false, 72, 216} : kNone;
  if (block_n == 64) return {64, dim == 64 ? 6 : 5, true, 72, 216};
  return {128, dim == 64 ? 4 : dim == 96 ? 3 : 2, false, 72, 216};
}

}  // namespace permattn::sm90
