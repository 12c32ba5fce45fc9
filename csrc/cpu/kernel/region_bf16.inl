// Rows of bf16 as steps of pairs.
template <>
struct Steps<Bf16Math<1>> {
  using Storage = uint16_t;
  using Arithmetic = Bf16Math<1>;

  PERMATTN_INLINE VecF read(const uint16_t* row, int64_t d, int64_t dim) {
    return reinterpret_cast<VecF>(Bf16Math<1>::load_pairs(row + d, dim - d));
  }

  PERMATTN_INLINE VecF with_sign(VecF x, float sign) {
    const __m512i flip = _mm512_set1_epi16(static_cast<int16_t>(sign < 0.0F ? 0x8000 : 0));
    return reinterpret_cast<VecF>(_mm512_xor_si512(reinterpret_cast<__m512i>(x), flip));
  }

  // Pairs of two rows; without the second one, of one and zeros.
  PERMATTN_INLINE VecF columns(const uint16_t* even, const uint16_t* odd, int64_t d, int64_t dim) {
    const int64_t left = dim - d;
    const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + d));
    if (odd == nullptr) return reinterpret_cast<VecF>(low);
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd + d));
    return reinterpret_cast<VecF>(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  // Sums are of the numbers before rounding: log-sum-exps are exact in float32.
  template <int Vectors>
  PERMATTN_INLINE void probabilities(float* s, int count, float c, const VecF* top, VecF* sum) {
    for (int i = 0; i < count; i += 2) {
#pragma GCC unroll 4
      for (int y = 0; y < Vectors; ++y) {
        const float* from = s + (i * Vectors + y) * kWidth;
        const VecF even = exp2_accurate(load(from) * c - top[y]);
        const VecF odd = exp2_accurate(load(from + Vectors * kWidth) * c - top[y]);
        sum[y] += even + odd;
        _mm512_store_si512(s + (i / 2 * Vectors + y) * kWidth,
                           Arithmetic::pair_up(to_native(even), to_native(odd)));
      }
    }
  }
};
