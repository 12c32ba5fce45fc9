// Rows of bf16 as steps of pairs.
template <>
struct Steps<Bf16Math<1>> {
  using Storage = uint16_t;
  using Arithmetic = Bf16Math<1>;

  PERMATTN_INLINE VecF load(const uint16_t* row, int64_t d, int64_t dim) {
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
};
