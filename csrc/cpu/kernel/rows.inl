// Rows of tensors into lanes and back: gathers by token, transposes and converts while packing.

// The first n < kWidth numbers at p, zeros after them; never reads past p + n.
template <class Type>
PERMATTN_INLINE VecF load_first(const typename Type::Storage* p, int64_t n) {
#if PERMATTN_WIDTH == 16
  const auto mask = static_cast<__mmask16>((1U << n) - 1U);
  if constexpr (sizeof(typename Type::Storage) == 4) {
    return reinterpret_cast<VecF>(_mm512_maskz_loadu_ps(mask, p));
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
    return Type::load(reinterpret_cast<const uint16_t*>(&half));
  }
#else
  typename Type::Storage row[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) row[i] = p[i];
  return Type::load(row);
#endif
}

template <class Type>
PERMATTN_INLINE VecF load_up_to(const typename Type::Storage* p, int64_t n) {
  return n >= kWidth ? Type::load(p) : load_first<Type>(p, n);
}

template <class Type>
PERMATTN_INLINE void store_up_to(typename Type::Storage* p, VecF x, int64_t n) {
  if (n >= kWidth) return Type::store(p, x);
#if PERMATTN_WIDTH == 16
  const auto mask = static_cast<__mmask16>((1U << n) - 1U);
  if constexpr (sizeof(typename Type::Storage) == 4) {
    _mm512_mask_storeu_ps(p, mask, reinterpret_cast<__m512>(x));
  } else {
    __m256i half;
    Type::store(reinterpret_cast<uint16_t*>(&half), x);
    _mm256_mask_storeu_epi16(p, mask, half);
  }
#else
  for (int64_t i = 0; i < n; ++i) Type::store_one(p + i, x[i]);
#endif
}

template <class Storage>
struct RowsOf {  // [S, width] of one (batch, head)
  const Storage* data;
  int64_t stride;

  RowsOf(const TensorView& view, int64_t b, int64_t h)
      : data(static_cast<const Storage*>(view.data) + b * view.stride_b + h * view.stride_h),
        stride(view.stride_s) {}

  const Storage* operator[](int64_t token) const { return data + token * stride; }
};
