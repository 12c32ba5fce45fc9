// Scores, softmax and values of one tile of keys, for the rows of one warp.
#pragma once
#include "../device/matrix_address.cuh"
#include "traits.cuh"

namespace permattn::sm80 {

using device::MatrixAddress;

constexpr float kMinusInfinity = -__builtin_inff();
// Factors of scores are not 0, by which a hidden score would become NaN.
constexpr float kLeastFactor = 1e-30F;

// Where a lane of a warp stands in fragments: rows row and row + 8, columns 2 * pair and the next.
struct LanePosition {
  int32_t lane, row, pair;
};

// The softmax of a warp's rows: what was seen so far, relative to 2^high.
template <class T>
struct Softmax {
  float acc[T::kRowTiles][T::kColumnTiles][4];
  float total[T::kRowTiles][4];  // as a column of ones in V: [0] and [2] count
  float high[T::kRowTiles][2];
};

// Q of a warp, in registers or where to read it.
template <class T>
struct QueryRows {
  uint32_t fragments[T::kQInRegisters ? T::kQkSteps : 1][T::kRowTiles][4];
  const char* shared;
  MatrixAddress<typename T::QLayout> address;
  // Of the lane's rows, in shared memory.
  const int32_t* tokens;
  const float* factors;  // where Q K^T is quantised; else `scale` is enough
  float scale;           // from scores to base 2; more than 0

  PERMATTN_DEVICE int32_t token(int m, int half) const { return tokens[16 * m + 8 * half]; }
  PERMATTN_DEVICE float factor(int m, int half) const {
    return T::kQuantisedQk ? factors[16 * m + 8 * half] : scale;
  }

  PERMATTN_DEVICE void read(int step, uint32_t (&a)[T::kRowTiles][4]) const {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
      ptx::ldmatrix_x4<false>(a[m], shared + address.at(16 * m, step));
    }
  }
};

template <class T>
using ScoreTile = typename T::Score[T::kRowTiles][T::kKeyTiles][4];
template <class T>
using FloatTile = float[T::kRowTiles][T::kKeyTiles][4];

template <class T>
PERMATTN_DEVICE void multiply_scores(const QueryRows<T>& q, uint32_t k_tile, int32_t lane,
                                     FloatTile<T>& score) {
  ScoreTile<T> sum;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; ++n) clear(sum[m][n]);
  }
  const auto address = MatrixAddress<typename T::KLayout>::of_b(k_tile, lane);
#pragma unroll(T::kUnrolledSteps)
  for (int step = 0; step < T::kQkSteps; ++step) {
    uint32_t loaded[T::kRowTiles][4];
    if constexpr (!T::kQInRegisters) q.read(step, loaded);
    const auto& a = T::kQInRegisters ? q.fragments[T::kQInRegisters ? step : 0] : loaded;
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4<false>(b, q.shared + address.at(8 * n, step));
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        T::Scores::multiply(sum[m][n], a[m], first);
        T::Scores::multiply(sum[m][n + 1], a[m], second);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[m][n][i] = value_of(sum[m][n][i]);
    }
  }
}

// Scores times the scale of their key, where the keys of a tile have several.
template <class T>
PERMATTN_DEVICE void scale_columns(const float* scale, const LanePosition& at,
                                   FloatTile<T>& score) {
#pragma unroll
  for (int n = 0; n < T::kKeyTiles; ++n) {
    const float left = scale[8 * n + 2 * at.pair], right = scale[8 * n + 2 * at.pair + 1];
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[m][n][i] *= i % 2 == 0 ? left : right;
    }
  }
}

// -inf where the token rule hides a key. is_partial: the band counts.
template <class T>
PERMATTN_DEVICE void mask_scores(const QueryRows<T>& q, const int32_t* tokens, bool is_partial,
                                 const LaneRange& band, const LanePosition& at,
                                 FloatTile<T>& score) {
#pragma unroll
  for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t token = tokens[8 * n + 2 * at.pair + i % 2];
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        const bool in_band = token_is_seen(static_cast<uint32_t>(q.token(m, i / 2)),
                                           static_cast<uint32_t>(token), band);
        const bool seen = token >= 0 && (in_band || !is_partial);
        score[m][n][i] = seen ? score[m][n][i] : kMinusInfinity;
      }
    }
  }
}

// Largest score of each row, before its factor.
template <class T>
PERMATTN_DEVICE void row_tops(const FloatTile<T>& score, float (&top)[T::kRowTiles][2]) {
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = kMinusInfinity;
#pragma unroll
      for (int n = 0; n < T::kKeyTiles; ++n) {
        high = fmaxf(high, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
      }
      top[m][half] = ptx::quad_max(high);
    }
  }
}

// The sums so far, relative to the new high: they are left alone where no row of the warp has one.
template <class T>
PERMATTN_DEVICE void shrink(const float (&by)[T::kRowTiles][2], Softmax<T>& state) {
  bool is_new = false;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) is_new = is_new || by[m][0] != 1.0F || by[m][1] != 1.0F;
  if (ptx::ballot(is_new) == 0) return;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      state.total[m][i] *= by[m][i / 2];
#pragma unroll
      for (int j = 0; j < T::kColumnTiles; ++j) state.acc[m][j][i] *= by[m][i / 2];
    }
  }
}

template <Dtype kDtype>
PERMATTN_DEVICE uint32_t pack(float low, float high) {
  if constexpr (kDtype == Dtype::kBFloat16) {
    return ptx::pack_bf16(low, high);
  } else {
    return ptx::pack_f16(low, high);
  }
}

// acc += P V in the dtype of V. P stays in registers: a fragment of C is one of A.
template <class T>
PERMATTN_DEVICE void add_values(const FloatTile<T>& score, const float (&factor)[T::kRowTiles][2],
                                const float (&safe)[T::kRowTiles][2], const char* shared,
                                uint32_t v_tile, int32_t lane, Softmax<T>& state) {
  constexpr uint32_t kOne = T::kDtype == Dtype::kBFloat16 ? 0x3F803F80U : 0x3C003C00U;
  const uint32_t ones[2] = {kOne, kOne};
  const auto address = MatrixAddress<typename T::VLayout>::of_a(v_tile, lane);
#pragma unroll
  for (int step = 0; step < T::kPvSteps; ++step) {
    uint32_t a[T::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i % 2;
        const auto& s = score[m][2 * step + i / 2];
        a[m][i] = pack<T::kDtype>(
            ptx::exp2_approx(fmaf(s[2 * half], factor[m][half], -safe[m][half])),
            ptx::exp2_approx(fmaf(s[2 * half + 1], factor[m][half], -safe[m][half])));
      }
      T::Values::multiply(state.total[m], a[m], ones);
    }
#pragma unroll
    for (int j = 0; j < T::kColumnTiles; j += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4<true>(b, shared + address.at(16 * step, j / 2));
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        T::Values::multiply(state.acc[m][j], a[m], first);
        T::Values::multiply(state.acc[m][j + 1], a[m], second);
      }
    }
  }
}

// P of a row, up to P_HIGH, as fragments of A: numbers of a step stand in the order of the values.
template <class T>
PERMATTN_DEVICE void quantise_p(const FloatTile<T>& score, int m, float factor0, float factor1,
                                float start0, float start1, uint32_t (&a)[T::kPvSteps][4]) {
  constexpr int kPerWord = 32 / bits_of(T::kPv);
#pragma unroll
  for (int step = 0; step < T::kPvSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i % 2;
      const int first = (2 * step + i / 2) * kPerWord / 2;
      float p[kPerWord];
#pragma unroll
      for (int e = 0; e < kPerWord; ++e) {
        const float s = score[m][first + e / 2][2 * half + e % 2];
        p[e] =
            ptx::exp2_approx(fmaf(s, half == 0 ? factor0 : factor1, half == 0 ? start0 : start1));
      }
      if constexpr (T::kPv == Format::kInt8) {
        a[step][i] = pack_bytes(p[0], p[1], p[2], p[3]);
      } else if constexpr (T::kPv == Format::kInt4) {
        a[step][i] = pack_nibbles(p);
      } else {
        a[step][i] = ptx::pack_e4m3(p[0], p[1], p[2], p[3]);
      }
    }
  }
}

// acc += P V of small numbers: P relative to the row's top in this tile, and summed as rounded.
template <class T>
PERMATTN_DEVICE void add_small_values(const FloatTile<T>& score,
                                      const float (&factor)[T::kRowTiles][2],
                                      const float (&top)[T::kRowTiles][2],
                                      const float (&safe)[T::kRowTiles][2], const char* shared,
                                      uint32_t v_tile, const LanePosition& at, Softmax<T>& state) {
  using Product = ValueProduct<T::kPv>;
  constexpr float kHigh = probability_high_of(T::kPv);
  constexpr float kLog2High = T::kPv == Format::kInt8   ? 7.99435344F
                              : T::kPv == Format::kInt4 ? 3.90689060F
                                                        : 8.80735492F;
  uint32_t a[T::kRowTiles][T::kPvSteps][4];
  float weight[T::kRowTiles][2];
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
    float start[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      start[half] = kLog2High - (top[m][half] == kMinusInfinity ? 0.0F : top[m][half]);
      weight[m][half] = ptx::exp2_approx(top[m][half] - safe[m][half]) * (1.0F / kHigh);
    }
    quantise_p<T>(score, m, factor[m][0], factor[m][1], start[0], start[1], a[m]);
    typename Product::Sum sum[4];
    const uint32_t ones[2] = {Product::kOnes, Product::kOnes};
    clear(sum);
#pragma unroll
    for (int step = 0; step < T::kPvSteps; ++step) Product::multiply(sum, a[m][step], ones);
#pragma unroll
    for (int i = 0; i < 4; ++i) state.total[m][i] += value_of(sum[i]) * weight[m][i / 2];
  }
  const auto* v_scale =
      reinterpret_cast<const float*>(shared + v_tile + T::kVTileBytes) + 2 * at.pair;
  const auto address = MatrixAddress<typename T::VLayout>::of_b(v_tile, at.lane);
#pragma unroll
  for (int j = 0; j < T::kColumnTiles; j += 2) {
    typename Product::Sum sum[T::kRowTiles][2][4];
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
      clear(sum[m][0]);
      clear(sum[m][1]);
    }
#pragma unroll
    for (int step = 0; step < T::kPvSteps; ++step) {
      uint32_t b[4];
      ptx::ldmatrix_x4<false>(b, shared + address.at(8 * j, step));
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        Product::multiply(sum[m][0], a[m][step], first);
        Product::multiply(sum[m][1], a[m][step], second);
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float left = v_scale[8 * (j + k)], right = v_scale[8 * (j + k) + 1];
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float by = weight[m][i / 2] * (i % 2 == 0 ? left : right);
          state.acc[m][j + k][i] = fmaf(value_of(sum[m][k][i]), by, state.acc[m][j + k][i]);
        }
      }
    }
  }
}

// Online softmax of one warp over one tile of keys in shared memory.
template <class T>
PERMATTN_DEVICE void attend_tile(const AttentionArgs& args, const QueryRows<T>& q,
                                 const LaneTile<T::kBlockN>& lanes, uint32_t stage,
                                 const LanePosition& at, Softmax<T>& state) {
  const PartArgs& part = args.parts[lanes.list / 2];
  FloatTile<T> score;
  multiply_scores<T>(q, stage, at.lane, score);

  float factor[T::kRowTiles][2];
  float tile_factor = 1.0F;
  if constexpr (T::kQuantisedQk) {
    // Where groups hold whole tiles, one number stands for the scales of all lanes.
    if (args.kv_rows % T::kBlockN == 0 && part.block_kv % T::kBlockN == 0) {
      tile_factor = lanes.scale[0];
    } else {
      scale_columns<T>(lanes.scale, at, score);
    }
  }
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factor[m][half] =
          T::kQuantisedQk ? fmaxf(q.factor(m, half) * tile_factor, kLeastFactor) : q.scale;
    }
  }

  const bool is_partial = lanes.list % 2 != 0 && part.has_band;
  if (is_partial || lanes.has_holes()) {
    mask_scores<T>(q, lanes.token, is_partial, part.band, at, score);
  }

  float top[T::kRowTiles][2], safe[T::kRowTiles][2], by[T::kRowTiles][2];
  row_tops<T>(score, top);
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[m][half] *= factor[m][half];
      float& high = state.high[m][half];
      const float now = fmaxf(high, top[m][half]);
      // A row that has seen nothing keeps -inf, and -inf - -inf must not become NaN.
      safe[m][half] = now == kMinusInfinity ? 0.0F : now;
      by[m][half] = high == now ? 1.0F : ptx::exp2_approx(high - safe[m][half]);
      high = now;
    }
  }
  shrink<T>(by, state);
  const uint32_t v_tile = stage + T::kKTileBytes;
  if constexpr (T::kQuantisedPv) {
    add_small_values<T>(score, factor, top, safe, q.shared, v_tile, at, state);
  } else {
    add_values<T>(score, factor, safe, q.shared, v_tile, at.lane, state);
  }
}

}  // namespace permattn::sm80
