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

// Lane vectors in use in the panel that begins at lane `first`.
PERMATTN_INLINE int panel_vectors(const Lanes& lanes, int first) {
  const int left = (lanes.count - first + kWidth - 1) / kWidth;
  return left < kMaxPanel ? left : kMaxPanel;
}

// kWidth lanes of C[column][lane], scaled lane by lane, as rows[lane][column].
PERMATTN_INLINE void lanes_to_rows(const float* c, int64_t width, int64_t columns, VecF factor,
                                   float* rows, int64_t row_stride) {
  for (int64_t d = 0; d < columns; d += kWidth) {
    VecF r[kWidth];
    for (int j = 0; j < kWidth; ++j) r[j] = load(c + (d + j) * width) * factor;
    transpose(r);
    for (int j = 0; j < kWidth; ++j) store(rows + j * row_stride + d, r[j]);
  }
}

struct Carver {
  std::byte* next;
  float* floats(int64_t n) {
    auto* p = reinterpret_cast<float*>(next);
    next += round_up(n * 4, 64);
    return p;
  }
};
