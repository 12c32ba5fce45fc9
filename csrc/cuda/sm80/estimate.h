// What one tile of keys costs a multiprocessor, unit by unit, from the shape of a kernel alone. No
// measurement: the largest of the numbers bounds a tile's time from below.
#pragma once
#include "dispatch.h"

namespace permattn::sm80 {

// What a multiprocessor does per cycle. Products are multiplications with their additions.
struct Rates {
  int32_t products_16;  // of bfloat16 or float16, summed in float32
  int32_t products_8;   // of bytes
  int32_t products_4;   // 0: there are none
  int32_t products_fp8;
  int32_t floats;  // sums and products of float32
};

constexpr int32_t kSharedBytesPerCycle = 128;
constexpr int32_t kExponentialsPerCycle = 16;

// Dense rates of NVIDIA's white papers, divided by multiprocessors and clock. Devices for graphics
// sum products of 16 bits in float32 at half their rate, and mma.sync on 9.0 runs at half of
// wgmma's.
constexpr Rates rates_of(int32_t capability) {
  switch (capability) {
    case 80:
      return {1024, 2048, 4096, 0, 64};
    case 86:
      return {256, 1024, 2048, 0, 128};
    case 89:
      return {256, 1024, 2048, 512, 128};
    case 90:
      return {1024, 2048, 0, 0, 128};
    default:  // 120
      return {256, 1024, 0, 512, 128};
  }
}

// Cycles of a multiprocessor for block_m rows and block_n keys.
struct TileCycles {
  int32_t products, shared, exponentials, floats;

  constexpr int32_t bound() const {
    const int32_t pairs[2] = {products > shared ? products : shared,
                              exponentials > floats ? exponentials : floats};
    return pairs[0] > pairs[1] ? pairs[0] : pairs[1];
  }
};

constexpr int32_t products_per_cycle(const Rates& rates, Format format) {
  return format == Format::kNone   ? rates.products_16
         : format == Format::kInt8 ? rates.products_8
         : format == Format::kInt4 ? rates.products_4
                                   : rates.products_fp8;
}

// Bytes that ldmatrix reads for a tile of keys: every warp reads all of K and V, and its rows of Q
// where they do not stay in registers.
constexpr int32_t bytes_read(Format qk, Format pv, int32_t dim, int32_t rows) {
  const TileShape shape = tile_shape(qk, pv, dim, rows);
  const int32_t k_bytes = shape.block_n * row_bytes(qk, dim);
  const int32_t v_bytes = shape.block_n * dim * bits_of(pv) / 8;
  const int32_t q_bytes = shape.block_m * row_bytes(qk, dim);
  return shape.warps * (k_bytes + v_bytes) + (shape.q_in_registers ? 0 : q_bytes);
}

// Of a kernel that exists and whose products the device has; head dims fill its width.
constexpr TileCycles tile_cycles(int32_t capability, Format qk, Format pv, int32_t dim,
                                 int32_t rows) {
  const TileShape shape = tile_shape(qk, pv, dim, rows);
  const Rates rates = rates_of(capability);
  const int32_t scores = shape.block_m * shape.block_n;
  const int32_t sums = shape.block_m * dim;
  const bool integers_qk = qk != Format::kNone;
  const bool integers_pv = pv == Format::kInt8 || pv == Format::kInt4;
  TileCycles cycles{};
  // Row sums of P are one more tile of 8 columns.
  cycles.products =
      scores * (row_bytes(qk, dim) * 8 / bits_of(qk)) / products_per_cycle(rates, qk) +
      scores * (dim + 8) / products_per_cycle(rates, pv);
  // Copies write K and V once.
  const int32_t copied = shape.block_n * (row_bytes(qk, dim) + dim * bits_of(pv) / 8);
  cycles.shared = (bytes_read(qk, pv, dim, rows) + copied) / kSharedBytesPerCycle;
  cycles.exponentials = scores / kExponentialsPerCycle;
  // A score: scaled and shifted at once; made a float of an integer; P rounded to an integer. A sum
  // of quantised P V: made a float of an integer, scaled by row and column, added.
  const int32_t per_score = 1 + (integers_qk ? 1 : 0) + (integers_pv ? 1 : 0);
  const int32_t per_sum = integers_pv ? 3 : pv == Format::kFp8 ? 2 : 0;
  cycles.floats = (scores * per_score + sums * per_sum) / rates.floats;
  return cycles;
}

}  // namespace permattn::sm80
