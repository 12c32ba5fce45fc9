// bf16 arithmetic on AMX tiles: 16 rows of 16 steps. Both products are C[x][lane] += A[x][k]
// B[k][lane] as in gemm.inl, with tiles in place of vectors; the softmax between them is
// Bf16Math's.

constexpr int kTile = 16;  // rows, and 4-byte columns
constexpr int64_t kTileFloats = kTile * kTile;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// All eight tiles at full size. The former configuration comes back at the end: oneDNN remembers
// per thread that its own is loaded. The barriers are for GCC 12, which thinks that loading a
// configuration reads 8 bytes of the 64 and drops the other stores.
class TileScope {
 public:
  TileScope() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
      config.column_bytes[i] = 64;
      config.rows[i] = kTile;
    }
    asm volatile("" ::: "memory");
    _tile_storeconfig(&before_);
    _tile_loadconfig(&config);
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
  ~TileScope() {
    asm volatile("" ::: "memory");
    if (before_.palette != 0) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }

 private:
  TileConfig before_;
};

struct TileProduct {
  const float* a;
  int64_t a_block, a_step,
      a_row;  // floats to the next 16 rows, to the next 16 steps, to the next row
  const float* b;
  float* c;
  int64_t lanes;  // floats per row of B and C
  int64_t steps;  // blocks of 16
};

// Two blocks of rows by two of lanes (or one where the second is missing): tiles 0-3 are C, 4-5 A,
// 6-7 B.
template <bool TwoRows, bool TwoLanes, bool Accumulate>
PERMATTN_INLINE void tile_block(const TileProduct& p) {
  const int64_t row_bytes = p.lanes * 4;
  float* c_below = p.c + kTile * p.lanes;
  if constexpr (Accumulate) {
    _tile_loadd(0, p.c, row_bytes);
    if constexpr (TwoLanes) _tile_loadd(1, p.c + kTile, row_bytes);
    if constexpr (TwoRows) _tile_loadd(2, c_below, row_bytes);
    if constexpr (TwoRows && TwoLanes) _tile_loadd(3, c_below + kTile, row_bytes);
  } else {
    _tile_zero(0);
    if constexpr (TwoLanes) _tile_zero(1);
    if constexpr (TwoRows) _tile_zero(2);
    if constexpr (TwoRows && TwoLanes) _tile_zero(3);
  }
  for (int64_t k = 0; k < p.steps; ++k) {
    const float* a = p.a + k * p.a_step;
    const float* b = p.b + k * kTile * p.lanes;
    _tile_loadd(6, b, row_bytes);
    _tile_loadd(4, a, p.a_row * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (TwoLanes) {
      _tile_loadd(7, b + kTile, row_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (TwoRows) {
      _tile_loadd(5, a + p.a_block, p.a_row * 4);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (TwoRows && TwoLanes) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, p.c, row_bytes);
  if constexpr (TwoLanes) _tile_stored(1, p.c + kTile, row_bytes);
  if constexpr (TwoRows) _tile_stored(2, c_below, row_bytes);
  if constexpr (TwoRows && TwoLanes) _tile_stored(3, c_below + kTile, row_bytes);
}

template <int Vectors, bool Accumulate>
PERMATTN_INLINE void tile_gemm(TileProduct p, int64_t row_blocks) {
  const TileProduct whole = p;
  for (int64_t x = 0; x < row_blocks; x += 2) {
    const bool two_rows = x + 1 < row_blocks;
#pragma GCC unroll 2
    for (int y = 0; y < Vectors; y += 2) {
      p.a = whole.a + x * whole.a_block;
      p.b = whole.b + y * kTile;
      p.c = whole.c + x * kTile * whole.lanes + y * kTile;
      if (y + 1 < Vectors) {
        two_rows ? tile_block<true, true, Accumulate>(p) : tile_block<false, true, Accumulate>(p);
      } else {
        two_rows ? tile_block<true, false, Accumulate>(p) : tile_block<false, false, Accumulate>(p);
      }
    }
  }
}

struct AmxMath : Bf16Math<kTile> {
  using Base = Bf16Math<kTile>;

  // Columns [d, d + 16) of streamed row i in the low halves of the lanes; zeros past both ends.
  PERMATTN_INLINE __m512i load_columns(const RowsOf<Storage>& rows, const int32_t* token, int i,
                                       int count, int64_t d, int64_t dim) {
    if (i >= count) return _mm512_setzero_si512();
    const int64_t left = dim - d;
    const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows[token[i]] + d));
  }

  // V^T as tiles: [32 rows][16 columns] of V become [column][pair of rows].
  PERMATTN_INLINE void pack_columns(const RowsOf<Storage>& rows, const int32_t* token, int count,
                                    int64_t dim, int64_t, float* a) {
    for (int first = 0; first < count; first += 2 * kTile) {
      for (int64_t d = 0; d < dim; d += kTile, a += kTileFloats) {
        VecF r[kTile];
        for (int j = 0; j < kTile; ++j) {
          const __m512i even = load_columns(rows, token, first + 2 * j, count, d, dim);
          const __m512i odd = load_columns(rows, token, first + 2 * j + 1, count, d, dim);
          r[j] = reinterpret_cast<VecF>(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
        transpose(r);
        for (int j = 0; j < kTile; ++j) store(a + j * kTile, r[j]);
      }
    }
  }

  template <int Vectors>
  PERMATTN_INLINE void scores(const float* k, int64_t k_stride, const float* q, float* s, int count,
                              int64_t steps) {
    constexpr int kLanes = Vectors * kWidth;
    tile_gemm<Vectors, false>({k, kTile * k_stride, kTile, k_stride, q, s, kLanes, steps / kTile},
                              (count + kTile - 1) / kTile);
    if (count % 2 != 0) {
      for (int y = 0; y < kLanes; y += kWidth) store(s + count * kLanes + y, splat(-kInfinity));
    }
  }

  // As Bf16Math's, and zeros in the rows that fill the last tile.
  template <int Vectors>
  PERMATTN_INLINE void probabilities(float* s, int count, float c, const VecF* top, VecF* sum) {
    Base::template probabilities<Vectors>(s, count, c, top, sum);
    const int pairs = (count + 1) / 2;
    for (int i = pairs; i < round_up(pairs, kTile); ++i) {
      for (int y = 0; y < Vectors; ++y) store(s + (i * Vectors + y) * kWidth, VecF{});
    }
  }

  template <int Vectors>
  PERMATTN_INLINE void values(const float* v, int64_t, const float* p, float* o, int count,
                              int64_t dim_v) {
    const int64_t blocks = (dim_v + kTile - 1) / kTile;
    const int64_t steps = (count + 2 * kTile - 1) / (2 * kTile);
    tile_gemm<Vectors, true>(
        {v, kTileFloats, blocks * kTileFloats, kTile, p, o, Vectors * kWidth, steps}, blocks);
  }
};
