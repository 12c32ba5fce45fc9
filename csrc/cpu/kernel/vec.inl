// Vectors of kWidth floats or int32, on GCC/Clang vector extensions. Included once per instruction
// set, inside its namespace and its target region; PERMATTN_WIDTH is the number of 32-bit lanes.
#define PERMATTN_INLINE static inline __attribute__((always_inline))
#define PERMATTN_METHOD inline __attribute__((always_inline))

constexpr int kWidth = PERMATTN_WIDTH;
constexpr float kLog2E = 1.44269504088896340736F;
constexpr float kLn2 = 0.69314718055994530942F;
constexpr float kInfinity = __builtin_inff();
// 1.5 * 2^23: integers up to 2^22 added to its bits add to its value.
constexpr float kExactSum = 12582912.0F;
constexpr int32_t kExactSumBits = 0x4b400000;

typedef float VecF __attribute__((vector_size(kWidth * 4), may_alias));
typedef int32_t VecI __attribute__((vector_size(kWidth * 4), may_alias));
typedef uint32_t VecU __attribute__((vector_size(kWidth * 4), may_alias));
typedef float VecFU __attribute__((vector_size(kWidth * 4), may_alias, aligned(4)));
typedef int32_t VecIU __attribute__((vector_size(kWidth * 4), may_alias, aligned(2)));
typedef uint16_t VecHU __attribute__((vector_size(kWidth * 2), may_alias, aligned(2)));

PERMATTN_INLINE VecF load(const float* p) { return *reinterpret_cast<const VecF*>(p); }
PERMATTN_INLINE VecF load_unaligned(const float* p) { return *reinterpret_cast<const VecFU*>(p); }
PERMATTN_INLINE void store(float* p, VecF x) { *reinterpret_cast<VecF*>(p) = x; }
PERMATTN_INLINE void store_unaligned(float* p, VecF x) { *reinterpret_cast<VecFU*>(p) = x; }
// Not `VecF{} + x`: A of a bf16 product is a pair of numbers, whose bits an addition would change.
PERMATTN_INLINE VecF splat(float x) {
#if PERMATTN_WIDTH == 16
  return reinterpret_cast<VecF>(_mm512_set1_ps(x));
#elif PERMATTN_WIDTH == 8
  return reinterpret_cast<VecF>(_mm256_set1_ps(x));
#else
  return VecF{x, x, x, x};
#endif
}
PERMATTN_INLINE VecI as_int(VecF x) { return reinterpret_cast<VecI>(x); }
PERMATTN_INLINE VecF as_float(VecI x) { return reinterpret_cast<VecF>(x); }

// a where the mask is all ones, b where it is zero.
PERMATTN_INLINE VecF select(VecI mask, VecF a, VecF b) {
  return as_float((as_int(a) & mask) | (as_int(b) & ~mask));
}

// b where either is NaN.
PERMATTN_INLINE VecF maximum(VecF a, VecF b) {
#if PERMATTN_WIDTH == 16
  return reinterpret_cast<VecF>(
      _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif PERMATTN_WIDTH == 8
  return reinterpret_cast<VecF>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// The nearest integer while |x| < 2^22; some integer-valued float near x beyond.
PERMATTN_INLINE VecF round_to_integer(VecF x) {
  constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}

// 2^x for x <= 64 or so, relative error 1e-7; 2^-inf is exactly 0, NaN stays NaN.
PERMATTN_INLINE VecF exp2_accurate(VecF x) {
#if PERMATTN_WIDTH == 16
  const VecF f = reinterpret_cast<VecF>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), 0x09));
  VecF p = f * 1.8775767e-3F + 8.9893397e-3F;
  p = p * f + 5.5826318e-2F;
  p = p * f + 0.24015361F;
  p = p * f + 0.69315308F;
  p = p * f + 0.99999994F;
  return reinterpret_cast<VecF>(
      _mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(x)));
#else
  constexpr float kMagic = 12582912.0F;
  const VecF clamped = maximum(splat(-126.0F), x);
  const VecF shifted = clamped + kMagic;
  const VecF f = clamped - (shifted - kMagic);
  VecF p = f * 1.3276472e-3F + 9.6755410e-3F;
  p = p * f + 5.5507131e-2F;
  p = p * f + 0.24022120F;
  p = p * f + 0.69314694F;
  p = p * f + 1.0000001F;
  const VecF power = as_float(as_int(p) + (as_int(shifted) << 23));
  // The integer addition would lose a NaN whose payload has low bits, and 2^-126 is not 0.
  return select(x == x, as_float(as_int(power) & (x >= -126.0F)), x);
#endif
}

// 2^n for integer-valued n <= 0: an exact power of two, 0 below 2^-126.
PERMATTN_INLINE VecF exp2_integer(VecF n) {
  const VecF clamped = maximum(splat(-127.0F), n);
  return as_float((__builtin_convertvector(clamped, VecI) + 127) << 23);
}

PERMATTN_INLINE bool any_greater(VecF a, VecF b) {
#if PERMATTN_WIDTH == 16
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ) !=
         0;
#elif PERMATTN_WIDTH == 8
  return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                          _CMP_GT_OQ)) != 0;
#else
  const VecI greater = a > b;
  int32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= greater[i];
  return any != 0;
#endif
}

// x in lanes whose bit is set, `other` elsewhere.
PERMATTN_INLINE VecF select_bits(uint32_t bits, VecF x, VecF other) {
#if PERMATTN_WIDTH == 16
  return reinterpret_cast<VecF>(_mm512_mask_mov_ps(
      reinterpret_cast<__m512>(other), static_cast<__mmask16>(bits), reinterpret_cast<__m512>(x)));
#else
  VecI lane_bit;
  for (int i = 0; i < kWidth; ++i) lane_bit[i] = 1 << i;
  const VecI wanted = (VecI{} + static_cast<int32_t>(bits)) & lane_bit;
  return select(wanted != 0, x, other);
#endif
}

// Bit i: lanes[i] - base <= width, unsigned (the token rule; see token_rule.h).
PERMATTN_INLINE uint32_t lanes_in_range(const uint32_t* lanes, uint32_t base, uint32_t width) {
#if PERMATTN_WIDTH == 16
  const __m512i lag = _mm512_sub_epi32(_mm512_load_si512(lanes), _mm512_set1_epi32(base));
  return _mm512_cmple_epu32_mask(lag, _mm512_set1_epi32(width));
#elif PERMATTN_WIDTH == 8
  const __m256i token = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
  const __m256i lag = _mm256_sub_epi32(token, _mm256_set1_epi32(base));
  const __m256i limit = _mm256_set1_epi32(width);
  return _mm256_movemask_ps(
      _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_min_epu32(lag, limit), lag)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= static_cast<uint32_t>(lanes[i] - base <= width) << i;
  return bits;
#endif
}

// IEEE half <-> float for one number, round to nearest even.
PERMATTN_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000U) << 16;
  const uint32_t magnitude = h & 0x7fffU;
  uint32_t bits = magnitude << 13;
  float value;
  if (magnitude >= 0x7c00U) {
    bits |= 0x7f800000U;
  } else {  // the multiplication moves the exponent's bias and makes subnormals normal
    __builtin_memcpy(&value, &bits, 4);
    value *= 0x1p112F;
    __builtin_memcpy(&bits, &value, 4);
  }
  bits |= sign;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

PERMATTN_INLINE uint16_t float_to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  bits &= 0x7fffffffU;
  if (bits > 0x7f800000U) return static_cast<uint16_t>(sign | 0x7e00U);
  if (bits >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);  // rounds to infinity
  if (bits < 0x38800000U) {                                               // subnormal or zero
    // Adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5F;
    __builtin_memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000U));
  }
  bits += 0xfffU + ((bits >> 13) & 1U);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000U) >> 13));
}

PERMATTN_INLINE uint16_t float_to_bfloat(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

struct Float32 {
  using Storage = float;
  PERMATTN_INLINE VecF load(const float* p) { return load_unaligned(p); }
  PERMATTN_INLINE float load_one(const float* p) { return *p; }
  PERMATTN_INLINE void store(float* p, VecF x) { store_unaligned(p, x); }
  PERMATTN_INLINE void store_one(float* p, float x) { *p = x; }
};

struct BFloat16 {
  using Storage = uint16_t;
  PERMATTN_INLINE VecF load(const uint16_t* p) {
    const VecHU half = *reinterpret_cast<const VecHU*>(p);
    return reinterpret_cast<VecF>(__builtin_convertvector(half, VecU) << 16);
  }
  PERMATTN_INLINE float load_one(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  PERMATTN_INLINE void store(uint16_t* p, VecF x) {
    const VecU bits = reinterpret_cast<VecU>(x);
    const VecU rounded = bits + 0x7fffU + ((bits >> 16) & 1U);
    const VecI nan = x != x;
    const VecU kept = (bits | 0x400000U) & reinterpret_cast<VecU>(nan);
    const VecU chosen = (rounded & ~reinterpret_cast<VecU>(nan)) | kept;
    *reinterpret_cast<VecHU*>(p) = __builtin_convertvector(chosen >> 16, VecHU);
  }
  PERMATTN_INLINE void store_one(uint16_t* p, float x) { *p = float_to_bfloat(x); }
};

struct Float16 {
  using Storage = uint16_t;
  PERMATTN_INLINE VecF load(const uint16_t* p) {
#if PERMATTN_WIDTH == 16
    return reinterpret_cast<VecF>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif PERMATTN_WIDTH == 8
    return reinterpret_cast<VecF>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    VecF x;
    for (int i = 0; i < kWidth; ++i) x[i] = half_to_float(p[i]);
    return x;
#endif
  }
  PERMATTN_INLINE float load_one(const uint16_t* p) { return half_to_float(*p); }
  PERMATTN_INLINE void store(uint16_t* p, VecF x) {
#if PERMATTN_WIDTH == 16
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(reinterpret_cast<__m512>(x), 0));
#elif PERMATTN_WIDTH == 8
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0));
#else
    for (int i = 0; i < kWidth; ++i) p[i] = float_to_half(x[i]);
#endif
  }
  PERMATTN_INLINE void store_one(uint16_t* p, float x) { *p = float_to_half(x); }
};

// Interleaves: (a0 b0 a1 b1 ...) of the lower and of the upper halves.
PERMATTN_INLINE VecF interleave_low(VecF a, VecF b) {
#if PERMATTN_WIDTH == 16
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif PERMATTN_WIDTH == 8
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
PERMATTN_INLINE VecF interleave_high(VecF a, VecF b) {
#if PERMATTN_WIDTH == 16
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
#elif PERMATTN_WIDTH == 8
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// kWidth x kWidth: one perfect shuffle of the rows per bit of the width.
PERMATTN_INLINE void transpose(VecF* rows) {
#pragma GCC unroll 4
  for (int stage = 1; stage < kWidth; stage *= 2) {
    VecF shuffled[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      shuffled[2 * i] = interleave_low(rows[i], rows[i + kWidth / 2]);
      shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + kWidth / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = shuffled[i];
  }
}
