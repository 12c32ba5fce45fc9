// Rounding to the numbers of a quantised format.

// b where either is NaN.
PERMATTN_INLINE VecF minimum(VecF a, VecF b) {
#if PERMATTN_WIDTH == 16
  return reinterpret_cast<VecF>(
      _mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif PERMATTN_WIDTH == 8
  return reinterpret_cast<VecF>(
      _mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

PERMATTN_INLINE VecF magnitude(VecF x) { return as_float(as_int(x) & 0x7fffffff); }

// To the nearest integer, ties to even; |x| < 2^22.
PERMATTN_INLINE VecI to_integer(VecF x) {
#if PERMATTN_WIDTH == 16
  return reinterpret_cast<VecI>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(x)));
#elif PERMATTN_WIDTH == 8
  return reinterpret_cast<VecI>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(x)));
#else
  return as_int(x + kExactSum) - kExactSumBits;
#endif
}

// The nearest number of FP8 e4m3, ties to even, of |x| <= 448.
PERMATTN_INLINE VecF round_to_e4m3(VecF x) {
  const VecI bits = as_int(x);
  const VecF normal = as_float((bits + 0x7ffff + ((bits >> 20) & 1)) & ~0xfffff);
  constexpr float kStep = 1.5F * 16384.0F;  // its last place is 2^-9, the subnormals' step
  const VecF subnormal = (x + kStep) - kStep;
  return select(magnitude(x) < 0x1p-6F, subnormal, normal);
}
