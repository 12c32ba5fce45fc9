// Shapes of the kernels of this family: one pure function of what a kernel multiplies, which the
// host's choice and the kernels themselves both read. Evidence: tests/cuda holds registers and
// shared memory of every row.
#pragma once
#include <cstdint>

#include "../../common/quant.h"

namespace permattn::sm80 {

struct TileShape {
  int32_t block_m, block_n;
  int32_t warps;
  int32_t stages;       // tiles of K and V in shared memory
  bool q_in_registers;  // or read again for every tile of keys
};

PERMATTN_HD constexpr int32_t bits_of(Format format) {
  return format == Format::kNone ? 16 : format == Format::kInt4 ? 4 : 8;
}

// Bytes of a row in shared memory: whole steps of a matrix instruction.
PERMATTN_HD constexpr int32_t row_bytes(Format format, int32_t numbers) {
  return (numbers * bits_of(format) / 8 + 31) / 32 * 32;
}

// Of kernels for tiles of up to `rows` (64 or 128) queries; block_m 0: there is none.
PERMATTN_HD constexpr TileShape tile_shape(Format qk, Format pv, int32_t dim, int32_t rows) {
  const bool quantised = pv != Format::kNone;
  if (rows == 64) {
    // A width of 256 spills whatever the tile.
    if (dim > 128) return {0, 0, 0, 0, false};
    // At a width of 128 the registers are full of sums.
    return {64, 64, 4, 2, dim < 128 || (qk != Format::kNone && !quantised)};
  }
  if (quantised || dim > 128) return {0, 0, 0, 0, false};
  if (dim == 64) return {128, 64, 8, 3, true};
  return {128, 64, 8, 2, true};
}

}  // namespace permattn::sm80
