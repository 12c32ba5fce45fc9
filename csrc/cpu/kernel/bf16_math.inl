// bf16 arithmetic with float accumulation: a step of an inner product is a pair (vdpbf16ps).

PERMATTN_INLINE __m512 to_native(VecF x) { return reinterpret_cast<__m512>(x); }
PERMATTN_INLINE VecF from_native(__m512 x) { return reinterpret_cast<VecF>(x); }

// StepBlock: Q and K are padded with zeros to that many steps (the depth of a tile, where there are
// tiles).
template <int StepBlock>
struct Bf16Math {
  using Type = BFloat16;
  using Storage = uint16_t;
  static constexpr int kPerStep = 2;
  static constexpr int kStepBlock = StepBlock;

  PERMATTN_INLINE VecF multiply_add(VecF acc, VecF a, VecF b) {
    return from_native(_mm512_dpbf16_ps(to_native(acc), reinterpret_cast<__m512bh>(a),
                                        reinterpret_cast<__m512bh>(b)));
  }

  // Up to 32 numbers at p, zeros after them.
  PERMATTN_INLINE __m512i load_pairs(const uint16_t* p, int64_t n) {
    if (n >= 32) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }

  PERMATTN_INLINE void pack_lanes(const RowsOf<Storage>& rows, const Lanes& lanes, int first,
                                  int vectors, int64_t dim, float sign, float* b) {
    const int64_t width = vectors * kWidth;
    const __m512i flip = _mm512_set1_epi16(static_cast<int16_t>(sign < 0.0F ? 0x8000 : 0));
    for (int group = 0; group < vectors; ++group) {
      const int lane = first + group * kWidth;
      for (int64_t d = 0; d < dim; d += 2 * kWidth) {
        VecF r[kWidth];
        for (int j = 0; j < kWidth; ++j) {
          const bool used = lane + j < lanes.count && sign != 0.0F;
          const __m512i row =
              used ? load_pairs(rows[lanes.token[lane + j]] + d, dim - d) : _mm512_setzero_si512();
          r[j] = reinterpret_cast<VecF>(used ? _mm512_xor_si512(row, flip) : row);
        }
        transpose(r);
        const int64_t left = round_up((dim + 1) / 2, StepBlock) - d / 2;
        const int64_t n = left < kWidth ? left : kWidth;
        for (int64_t j = 0; j < n; ++j) store(b + (d / 2 + j) * width + group * kWidth, r[j]);
      }
    }
  }

  PERMATTN_INLINE void pack_rows(const RowsOf<Storage>& rows, const int32_t* token, int count,
                                 int64_t dim, int64_t stride, float* a) {
    for (int i = 0; i < count; ++i) {
      const uint16_t* row = rows[token[i]];
      for (int64_t d = 0; d < dim; d += 2 * kWidth) {
        _mm512_store_si512(a + i * stride + d / 2, load_pairs(row + d, dim - d));
      }
    }
  }

  // A[pair of rows][column][2]; an odd last row is paired with zeros.
  PERMATTN_INLINE void pack_columns(const RowsOf<Storage>& rows, const int32_t* token, int count,
                                    int64_t dim, int64_t stride, float* a) {
    const __m512i unpack =
        _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = _mm512_add_epi16(unpack, _mm512_set1_epi16(16));
    for (int i = 0; i < count; i += 2) {
      const uint16_t* even = rows[token[i]];
      const uint16_t* odd = i + 1 < count ? rows[token[i + 1]] : nullptr;
      for (int64_t d = 0; d < dim; d += 2 * kWidth) {
        const __m512i x = load_pairs(even + d, dim - d);
        const __m512i y = odd != nullptr ? load_pairs(odd + d, dim - d) : _mm512_setzero_si512();
        float* to = a + i / 2 * stride + d;
        _mm512_store_si512(to, _mm512_permutex2var_epi16(x, unpack, y));
        _mm512_store_si512(to + kWidth, _mm512_permutex2var_epi16(x, upper, y));
      }
    }
  }

  template <int Vectors>
  PERMATTN_INLINE void scores(const float* k, int64_t k_stride, const float* q, float* s, int count,
                              int64_t steps) {
    gemm<Bf16Math, Vectors>(k, k_stride, 1, q, s, count, steps, false);
    if (count % 2 != 0) {
      for (int y = 0; y < Vectors; ++y)
        store(s + (count * Vectors + y) * kWidth, splat(-kInfinity));
    }
  }

  template <int Vectors>
  PERMATTN_INLINE void values(const float* v, int64_t v_stride, const float* p, float* o, int count,
                              int64_t dim_v) {
    gemm<Bf16Math, Vectors>(v, 1, v_stride, p, o, dim_v, (count + 1) / 2, true);
  }

  // 2^(s * c - top), relative error 8e-5 where bf16 has 2e-3; -inf gives 0, NaN stays.
  PERMATTN_INLINE __m512 exp2_fast(VecF s, VecF c, VecF top) {
    const __m512 x = _mm512_fmsub_ps(to_native(s), to_native(c), to_native(top));
    const __m512 f = _mm512_reduce_ps(x, 0x09);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.078024521F), f, _mm512_set1_ps(0.22606716F));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69583356F));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999252F));
    return _mm512_scalef_ps(p, x);
  }

  // Two rows of lanes as one row of pairs.
  PERMATTN_INLINE __m512i pair_up(__m512 even, __m512 odd) {
    const __m512i weave =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(weave,
                                    reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
  }

  // P[count][lane] of floats to rows of pairs, in place; row `count` is zeros where it is odd.
  template <int Vectors>
  PERMATTN_INLINE void narrow(float* p, int count) {
    for (int i = 0; i < count; i += 2) {
      for (int y = 0; y < Vectors; ++y) {
        const float* from = p + (i * Vectors + y) * kWidth;
        const __m512 even = to_native(load(from));
        const __m512 odd = to_native(load(from + Vectors * kWidth));
        _mm512_store_si512(p + (i / 2 * Vectors + y) * kWidth, pair_up(even, odd));
      }
    }
  }

  // Two rows of scores to one row of pairs, in place: row j of P overwrites rows already read.
  // The sums are of the rounded numbers, which is what multiplies V.
  template <int Vectors>
  PERMATTN_INLINE void probabilities(float* s, int count, float c, const VecF* top, VecF* sum) {
    const VecF scale = splat(c);
    const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
    for (int i = 0; i < count; i += 2) {
#pragma GCC unroll 4
      for (int y = 0; y < Vectors; ++y) {
        const float* from = s + (i * Vectors + y) * kWidth;
        const __m512 even = exp2_fast(load(from), scale, top[y]);
        const __m512 odd = exp2_fast(load(from + Vectors * kWidth), scale, top[y]);
        const __m512i pairs = pair_up(even, odd);
        sum[y] = from_native(
            _mm512_dpbf16_ps(to_native(sum[y]), reinterpret_cast<__m512bh>(pairs), ones));
        _mm512_store_si512(s + (i / 2 * Vectors + y) * kWidth, pairs);
      }
    }
  }
};
