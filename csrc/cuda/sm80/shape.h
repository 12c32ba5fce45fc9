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
  int32_t blocks;       // of a multiprocessor, which bounds registers
};

PERMATTN_HD constexpr int32_t bits_of(Format format) {
  return format == Format::kNone ? 16 : format == Format::kInt4 ? 4 : 8;
}

// Bytes of a row in shared memory: whole steps of a matrix instruction.
PERMATTN_HD constexpr int32_t row_bytes(Format format, int32_t numbers) {
  return (numbers * bits_of(format) / 8 + 31) / 32 * 32;
}

// Of kernels for tiles of up to `rows` (64 or 128) queries; block_m 0: there is none.
//
// Where registers allow, a warp has 32 rows: those of 16 read shared memory as long as they
// multiply (two bytes per number: 16 x 64 x 64 products take an A100 128 cycles, and so do the 16
// KB of K and V that they read). A width of 128 then leaves room for 32 keys at a time.
PERMATTN_HD constexpr TileShape tile_shape(Format qk, Format pv, int32_t dim, int32_t rows) {
  if (pv != Format::kNone) {
    // A tile of keys is one group of V; sums of integers take the registers of 16 more rows.
    if (rows != 64 || dim > 128) return {};
    return {64, 64, 4, 2, true, dim == 64 ? 3 : 2};
  }
  if (dim == 256) return rows == 64 ? TileShape{64, 32, 4, 2, false, 1} : TileShape{};
  const int32_t warps = rows / 32;
  if (dim == 64) return {rows, 64, warps, 2, true, 1};
  // Little is read of K, so that 16 rows a warp read less than they multiply.
  if (qk == Format::kInt4 && dim == 128) {
    return rows == 64 ? TileShape{64, 64, 4, 2, true, 2} : TileShape{};
  }
  return {rows, 32, warps, 2, false, 1};
}

}  // namespace permattn::sm80
