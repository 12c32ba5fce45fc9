// What a warpgroup makes of the scores of one tile: they are hidden, compared and become P.
#pragma once
#include "../primitives/halves.cuh"
#include "../primitives/wgmma.cuh"
#include "traits.cuh"

namespace permattn::sm90 {

constexpr float kMinusInfinity = -__builtin_inff();
// Integers below 2^22 added to these bits are, as a float, that number plus them: no conversion is
// needed. 127 * 127 * 128 and 255 * 127 * 64 are below.
constexpr uint32_t kIntegerZero = 0x4B400000U;
constexpr float kIntegerBias = 12582912.0F;

PERMATTN_DEVICE float value_of(float sum) { return sum; }
PERMATTN_DEVICE float value_of(int32_t sum) {
  return ptx::float_from_bits(static_cast<uint32_t>(sum) + kIntegerZero) - kIntegerBias;
}

// The two rows of a tile that a thread has: row and row + 8 of its warp's sixteen. Of every eight
// columns it has 2 * pair and the next.
struct ThreadRows {
  int32_t pair;
  int32_t token[2];
  float factor[2];  // from scores to base 2; more than 0
};

// What was seen so far, relative to 2^high. total: this thread's share, or all of it
// (kSharesTotal).
template <class T>
struct Softmax {
  float acc[T::kColumns];
  float total[2];
  float high[2];
};

// -inf where the token rule hides a key.
template <class T>
PERMATTN_DEVICE void mask_scores(const ThreadRows& rows, const int32_t* tokens, bool is_partial,
                                 const LaneRange& band, float (&score)[T::kScores]) {
#pragma unroll
  for (int i = 0; i < T::kScores; ++i) {
    const int32_t token = tokens[i / 4 * 8 + 2 * rows.pair + i % 2];
    const bool in_band = token_is_seen(static_cast<uint32_t>(rows.token[i % 4 / 2]),
                                       static_cast<uint32_t>(token), band);
    const bool seen = token >= 0 && (in_band || !is_partial);
    score[i] = seen ? score[i] : kMinusInfinity;
  }
}

// Scores times the scale of their key, where the keys of a tile have several.
template <class T>
PERMATTN_DEVICE void scale_columns(const float* scale, int32_t pair, float (&score)[T::kScores]) {
#pragma unroll
  for (int i = 0; i < T::kScores; ++i) score[i] *= scale[i / 4 * 8 + 2 * pair + i % 2];
}

// Largest score of each row, before its factor.
template <class T>
PERMATTN_DEVICE void row_tops(const float (&score)[T::kScores], float (&top)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float high = kMinusInfinity;
#pragma unroll
    for (int i = 2 * half; i < T::kScores; i += 4) {
      high = fmaxf(high, fmaxf(score[i], score[i + 1]));
    }
    top[half] = ptx::quad_max(high);
  }
}

// Scores become P. `by`: what the sums so far shrink by; `weight`: of P, where it is quantised.
template <class T>
PERMATTN_DEVICE void exponentiate(const AttentionArgs& args, const ThreadRows& rows, int32_t half,
                                  const KeyTile<T::kBlockN>& tile, float (&score)[T::kScores],
                                  float (&high)[2], float (&by)[2], float (&weight)[2]) {
  const PartArgs& part = args.parts[tile.part];
  float tile_factor = 1.0F;
  if constexpr (T::kQuantisedQk) {
    // Where groups hold whole tiles, one number stands for the scales of all lanes.
    if (args.kv_rows % T::kBlockN == 0 && part.block_kv % T::kBlockN == 0) {
      tile_factor = tile.scale[0];
    } else {
      scale_columns<T>(tile.scale, rows.pair, score);
    }
  }
  if (tile.is_partial || tile.has_holes(half)) {
    mask_scores<T>(rows, tile.token[half], tile.is_partial, part.band, score);
  }
  float top[2], factor[2], start[2];
  row_tops<T>(score, top);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    // Not 0, by which a hidden score would become NaN.
    factor[i] = T::kQuantisedQk ? fmaxf(rows.factor[i] * tile_factor, 1e-30F) : rows.factor[i];
    top[i] *= factor[i];
    const float now = fmaxf(high[i], top[i]);
    // A row that has seen nothing keeps -inf, and -inf - -inf must not become NaN.
    const float safe = now == kMinusInfinity ? 0.0F : now;
    by[i] = high[i] == now ? 1.0F : ptx::exp2_approx(high[i] - safe);
    high[i] = now;
    start[i] = -safe;
    if constexpr (T::kQuantisedPv) {
      constexpr float kHigh = probability_high_of(T::kPv);
      constexpr float kLog2High = T::kPv == Format::kInt8 ? 7.99435344F : 8.80735492F;
      start[i] = kLog2High - (top[i] == kMinusInfinity ? 0.0F : top[i]);
      weight[i] = ptx::exp2_approx(top[i] - safe) * (1.0F / kHigh);
    }
  }
#pragma unroll
  for (int i = 0; i < T::kScores; ++i) {
    score[i] = ptx::exp2_approx(fmaf(score[i], factor[i % 4 / 2], start[i % 4 / 2]));
  }
}

// The sums so far relative to the new high: left alone where no row of the warp has one.
template <class T>
PERMATTN_DEVICE void shrink(const float (&by)[2], Softmax<T>& state) {
  if (ptx::ballot(by[0] != 1.0F || by[1] != 1.0F) == 0) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) state.total[i] *= by[i];
#pragma unroll
  for (int i = 0; i < T::kColumns; ++i) state.acc[i] *= by[i % 4 / 2];
}

// The last bytes of four numbers up to 255, rounded half to even.
PERMATTN_DEVICE uint32_t pack_bytes(float p0, float p1, float p2, float p3) {
  const uint32_t low =
      __byte_perm(ptx::bits_of(p0 + kIntegerBias), ptx::bits_of(p1 + kIntegerBias), 0x0040);
  const uint32_t high =
      __byte_perm(ptx::bits_of(p2 + kIntegerBias), ptx::bits_of(p3 + kIntegerBias), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// P as fragments of A: a fragment of C is one. The sums add what P was rounded to, times its
// weight.
template <class T>
PERMATTN_DEVICE void pack_p(const float (&p)[T::kScores], uint32_t (&words)[T::kPvSteps][4],
                            const float (&weight)[2], float (&total)[2]) {
  uint32_t bytes[2] = {};  // summed
#pragma unroll
  for (int step = 0; step < T::kPvSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i % 2;
      uint32_t& word = words[step][i];
      if constexpr (T::kQuantisedPv) {
        const int first = 4 * (4 * step + i / 2 * 2) + 2 * row, second = first + 4;
        if constexpr (T::kPv == Format::kInt8) {
          word = pack_bytes(p[first], p[first + 1], p[second], p[second + 1]);
          bytes[row] = __dp4a(word, 0x01010101U, bytes[row]);
        } else {
          word = ptx::pack_e4m3(p[first], p[first + 1], p[second], p[second + 1]);
        }
      } else {
        constexpr bool kIsBf16 = T::kDtype == Dtype::kBFloat16;
        const int first = 4 * (2 * step + i / 2) + 2 * row;
        word = kIsBf16 ? ptx::pack_bf16(p[first], p[first + 1])
                       : ptx::pack_f16(p[first], p[first + 1]);
        total[row] += kIsBf16 ? ptx::low_bf16(word) + ptx::high_bf16(word)
                              : ptx::low_f16(word) + ptx::high_f16(word);
      }
    }
  }
  if constexpr (T::kPv == Format::kInt8) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      total[row] = fmaf(value_of(static_cast<int32_t>(bytes[row])), weight[row], total[row]);
    }
  }
}

}  // namespace permattn::sm90
