// Products of unsigned by signed bytes, summed exactly in int32: a step of an inner product is four
// of them. Keys are stored plus 128 and so unsigned, against signed queries; the sums begin at what
// takes the 128 away. Probabilities are unsigned against signed values.

typedef int32_t Dword __attribute__((may_alias, aligned(4)));
typedef int16_t VecS __attribute__((vector_size(kWidth * 4), may_alias));

PERMATTN_INLINE VecI load_ints(const void* p) { return *static_cast<const VecI*>(p); }
PERMATTN_INLINE VecI splat_dword(const void* p) { return VecI{} + *static_cast<const Dword*>(p); }

constexpr int32_t kOneBytes = 0x01010101;
constexpr int32_t kKeyBias = 128;

// Integer sums of one row of O^T, weighted into it.
template <int Vectors>
struct ValueSums {
  float* o;              // [column][lane]
  const float* v_scale;  // [column]
  const VecF* weight;    // by lane

  PERMATTN_METHOD void add(int64_t column, int y, VecI sum) const {
    float* p = o + (column * Vectors + y) * kWidth;
    const VecF factor = splat(v_scale[column]) * weight[y];
    store(p, load(p) + __builtin_convertvector(sum, VecF) * factor);
  }
};

PERMATTN_INLINE constexpr int byte_block_rows(int vectors) {
#if PERMATTN_WIDTH == 16
  return vectors >= 3 ? 4 : vectors == 2 ? 8 : 16;
#else
  return vectors == 2 ? 4 : 8;
#endif
}

// Both products on vectors: C[row][lane] = start[lane] + sum_k A[row][k] B[k][lane]. `Bytes` says
// how four products of bytes are added to a lane.
template <class Bytes_>
struct VectorProducts {
  using Bytes = Bytes_;
  static constexpr int kStepBlock = 1;
  static constexpr Layout kValueLayout = Layout::kQuads;

  // Keys are rows of bytes; the scores are floats kExactSum + score.
  template <int Vectors>
  PERMATTN_INLINE void scores(const std::byte* k, int64_t k_stride, const float* q,
                              const float* start, float* s, int count, int64_t steps) {
    constexpr int kRows = byte_block_rows(Vectors);
    for (int first = 0; first < count; first += kRows) {
      VecI acc[kRows][Vectors];
#pragma GCC unroll 16
      for (int x = 0; x < kRows; ++x) {
#pragma GCC unroll 4
        for (int y = 0; y < Vectors; ++y) acc[x][y] = load_ints(start + y * kWidth);
      }
      const std::byte* a = k + first * k_stride;
      const float* b = q;
      for (int64_t step = 0; step < steps; ++step, a += 4, b += Vectors * kWidth) {
        typename Bytes::Signed lane[Vectors];
#pragma GCC unroll 4
        for (int y = 0; y < Vectors; ++y) lane[y] = Bytes::as_signed(load_ints(b + y * kWidth));
#pragma GCC unroll 16
        for (int x = 0; x < kRows; ++x) {
          const auto value = Bytes::as_unsigned(splat_dword(a + x * k_stride));
#pragma GCC unroll 4
          for (int y = 0; y < Vectors; ++y) acc[x][y] = Bytes::add(acc[x][y], value, lane[y]);
        }
      }
#pragma GCC unroll 16
      for (int x = 0; x < kRows; ++x) {
#pragma GCC unroll 4
        for (int y = 0; y < Vectors; ++y) {
          store(s + ((first + x) * Vectors + y) * kWidth, as_float(acc[x][y]));
        }
      }
    }
  }

  // V as [quad][column] dwords, `columns` a quad; P as [quad][lane].
  template <int Vectors>
  PERMATTN_INLINE void values(const std::byte* v, int64_t columns, float* p, int quads,
                              int64_t dim_v, float*, const ValueSums<Vectors>& sums) {
    constexpr int kRows = byte_block_rows(Vectors);
    for (int64_t first = 0; first < dim_v; first += kRows) {
      VecI acc[kRows][Vectors] = {};
      const std::byte* a = v + 4 * first;
      const float* b = p;
      for (int step = 0; step < quads; ++step, a += 4 * columns, b += Vectors * kWidth) {
        typename Bytes::Unsigned lane[Vectors];
#pragma GCC unroll 4
        for (int y = 0; y < Vectors; ++y) lane[y] = Bytes::as_unsigned(load_ints(b + y * kWidth));
#pragma GCC unroll 16
        for (int x = 0; x < kRows; ++x) {
          const auto value = Bytes::as_signed(splat_dword(a + 4 * x));
#pragma GCC unroll 4
          for (int y = 0; y < Vectors; ++y) acc[x][y] = Bytes::add(acc[x][y], lane[y], value);
        }
      }
#pragma GCC unroll 16
      for (int x = 0; x < kRows; ++x) {
#pragma GCC unroll 4
        for (int y = 0; y < Vectors; ++y) sums.add(first + x, y, acc[x][y]);
      }
    }
  }
};

// Bytes as int16, even and odd apart: two multiply-adds of pairs.
struct PairBytes {
  struct Signed {
    VecI even, odd;
  };
  using Unsigned = Signed;

  PERMATTN_INLINE Unsigned as_unsigned(VecI x) { return {x & 0x00ff00ff, (x >> 8) & 0x00ff00ff}; }
  PERMATTN_INLINE Signed as_signed(VecI x) {
    const VecS halves = reinterpret_cast<VecS>(x);
    return {reinterpret_cast<VecI>((halves << 8) >> 8), reinterpret_cast<VecI>(halves >> 8)};
  }
  PERMATTN_INLINE VecI add_pairs(VecI a, VecI b) {
#if PERMATTN_WIDTH == 16
    return reinterpret_cast<VecI>(
        _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif PERMATTN_WIDTH == 8
    return reinterpret_cast<VecI>(
        _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
  }
  PERMATTN_INLINE VecI add(VecI acc, const Unsigned& a, const Signed& b) {
    return acc + add_pairs(a.even, b.even) + add_pairs(a.odd, b.odd);
  }
};
