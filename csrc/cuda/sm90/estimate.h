// What a step of the main loop costs a multiprocessor, unit by unit: from the shape of a kernel and
// from what its loop compiled to. No measurement: the largest of the numbers bounds a step's time
// from below.
#pragma once
#include "shape.h"

namespace permattn::sm90 {

// Of an H100 or H200, per cycle of a multiprocessor. Dense rates of the white paper (989 and 1979
// TFLOP/s), divided by 132 multiprocessors and 1.83 GHz; a product is one with its addition.
constexpr int32_t kProducts16PerCycle = 2048;
constexpr int32_t kProducts8PerCycle = 4096;
constexpr int32_t kSharedBytesPerCycle = 128;
// 7 TB/s, the most that is published of this L2 cache, divided likewise.
constexpr int32_t kL2BytesPerCycle = 29;
// Of a quarter of a multiprocessor, for an instruction of a warp: 32, 16 and 4 lanes at a time.
constexpr int32_t kFloatCycles = 1, kLogicCycles = 2, kSpecialCycles = 8;

// Instructions of a warp, and those among them that take a pipe.
struct Issued {
  int32_t all, floats, logic, special;

  // Of a quarter that runs nothing else.
  constexpr int32_t cycles() const {
    const int32_t pipes[3] = {floats * kFloatCycles, logic * kLogicCycles,
                              special * kSpecialCycles};
    int32_t most = all;
    for (const int32_t pipe : pipes) most = pipe > most ? pipe : most;
    return most;
  }
  constexpr Issued operator+(const Issued& o) const {
    return {all + o.all, floats + o.floats, logic + o.logic, special + o.special};
  }
};

// A warp's way round the loop of math.cuh, by its two waits.
struct LoopCode {
  Issued until_scores;   // Q K^T of this tile and P V of the last one are set going
  Issued beside_values;  // P V may still be under way
  Issued after_values;
};

// Cycles of a multiprocessor for one step: each half multiplies a tile of block_n keys.
struct StepCycles {
  int32_t products, shared, instructions, l2;
  // Of a half that has the multiprocessor to itself: its products and instructions wait for each
  // other.
  int32_t alone;

  constexpr int32_t bound() const {
    int32_t most = products;
    for (const int32_t x : {shared, instructions, l2, alone}) most = x > most ? x : most;
    return most;
  }
};

constexpr int32_t products_per_cycle(bool is_quantised) {
  return is_quantised ? kProducts8PerCycle : kProducts16PerCycle;
}

// Of a kernel that exists. `tiles`: copied for a step; 1 where both halves want the same keys, 2
// where each has its own.
constexpr StepCycles step_cycles(Format qk, Format pv, int32_t dim, int32_t block_n, int32_t tiles,
                                 const LoopCode& code) {
  const TileShape shape = tile_shape(qk, pv, dim, block_n);
  const bool small_qk = qk != Format::kNone, small_pv = pv != Format::kNone;
  // FP8 has columns of ones behind those of V, whose sums are those of P.
  const int32_t columns = dim + (pv == Format::kFp8 ? 8 : 0);
  const int32_t scores = kHalfRows * block_n;
  const int32_t qk_cycles = scores * dim / products_per_cycle(small_qk);
  const int32_t pv_cycles = scores * columns / products_per_cycle(small_pv);
  const int32_t k_bytes = block_n * dim * (small_qk ? 1 : 2);
  const int32_t v_bytes = block_n * dim * (small_pv ? 1 : 2);
  const int32_t ones_bytes = block_n * (columns - dim);
  const int32_t q_bytes = shape.q_in_registers ? 0 : kHalfRows * dim * (small_qk ? 1 : 2);
  const int32_t copied = tiles * (k_bytes + v_bytes);
  StepCycles cycles{};
  cycles.products = kHalves * (qk_cycles + pv_cycles);
  cycles.shared =
      (kHalves * (k_bytes + v_bytes + ones_bytes + q_bytes) + copied) / kSharedBytesPerCycle;
  cycles.l2 = copied / kL2BytesPerCycle;
  // A quarter of the multiprocessor has one warp of each half.
  const Issued once = code.until_scores + code.beside_values + code.after_values;
  const Issued both = once + once;
  cycles.instructions = both.cycles();
  const int32_t beside = code.beside_values.cycles(), before = code.until_scores.cycles();
  cycles.alone = (qk_cycles > before ? qk_cycles : before) +
                 (pv_cycles > beside ? pv_cycles : beside) + code.after_values.cycles();
  return cycles;
}

}  // namespace permattn::sm90
