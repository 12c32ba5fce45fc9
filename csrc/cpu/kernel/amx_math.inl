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
  int64_t lanes;                 // floats per row of B and C
  int64_t steps;                 // blocks of 16
  const float* start = nullptr;  // [lane]: what every row of C begins with
};

// What C begins with.
enum class TileStart { kZeros, kSums, kLanes };

// The products of one instruction, tiles 4-5 (A) by 6-7 (B): its operands must be literals.
#define PERMATTN_TILE_PRODUCTS(Name, instruction)                \
  struct Name {                                                  \
    PERMATTN_INLINE void upper_left() { instruction(0, 4, 6); }  \
    PERMATTN_INLINE void upper_right() { instruction(1, 4, 7); } \
    PERMATTN_INLINE void lower_left() { instruction(2, 5, 6); }  \
    PERMATTN_INLINE void lower_right() { instruction(3, 5, 7); } \
  }
PERMATTN_TILE_PRODUCTS(Bf16Tiles, _tile_dpbf16ps);
PERMATTN_TILE_PRODUCTS(UnsignedSignedTiles, _tile_dpbusd);
PERMATTN_TILE_PRODUCTS(SignedUnsignedTiles, _tile_dpbsud);
#undef PERMATTN_TILE_PRODUCTS

template <TileStart Start, bool TwoRows, bool TwoLanes>
PERMATTN_INLINE void begin_tiles(const TileProduct& p) {
  if constexpr (Start == TileStart::kZeros) {
    _tile_zero(0);
    if constexpr (TwoLanes) _tile_zero(1);
    if constexpr (TwoRows) _tile_zero(2);
    if constexpr (TwoRows && TwoLanes) _tile_zero(3);
    return;
  }
  constexpr bool kRowsAlike = Start == TileStart::kLanes;
  const float* upper = kRowsAlike ? p.start : p.c;
  const float* lower = kRowsAlike ? p.start : p.c + kTile * p.lanes;
  const int64_t row_bytes = kRowsAlike ? 0 : p.lanes * 4;
  _tile_loadd(0, upper, row_bytes);
  if constexpr (TwoLanes) _tile_loadd(1, upper + kTile, row_bytes);
  if constexpr (TwoRows) _tile_loadd(2, lower, row_bytes);
  if constexpr (TwoRows && TwoLanes) _tile_loadd(3, lower + kTile, row_bytes);
}

// Two blocks of rows by two of lanes (or one where the second is missing): tiles 0-3 are C, 4-5 A,
// 6-7 B.
template <class Tiles, TileStart Start, bool TwoRows, bool TwoLanes>
PERMATTN_INLINE void tile_block(const TileProduct& p) {
  const int64_t row_bytes = p.lanes * 4;
  float* c_below = p.c + kTile * p.lanes;
  begin_tiles<Start, TwoRows, TwoLanes>(p);
  for (int64_t k = 0; k < p.steps; ++k) {
    const float* a = p.a + k * p.a_step;
    const float* b = p.b + k * kTile * p.lanes;
    _tile_loadd(6, b, row_bytes);
    _tile_loadd(4, a, p.a_row * 4);
    Tiles::upper_left();
    if constexpr (TwoLanes) {
      _tile_loadd(7, b + kTile, row_bytes);
      Tiles::upper_right();
    }
    if constexpr (TwoRows) {
      _tile_loadd(5, a + p.a_block, p.a_row * 4);
      Tiles::lower_left();
    }
    if constexpr (TwoRows && TwoLanes) Tiles::lower_right();
  }
  _tile_stored(0, p.c, row_bytes);
  if constexpr (TwoLanes) _tile_stored(1, p.c + kTile, row_bytes);
  if constexpr (TwoRows) _tile_stored(2, c_below, row_bytes);
  if constexpr (TwoRows && TwoLanes) _tile_stored(3, c_below + kTile, row_bytes);
}

template <class Tiles, int Vectors, TileStart Start>
PERMATTN_INLINE void tile_gemm(TileProduct p, int64_t row_blocks) {
  const TileProduct whole = p;
  for (int64_t x = 0; x < row_blocks; x += 2) {
    const bool two_rows = x + 1 < row_blocks;
#pragma GCC unroll 2
    for (int y = 0; y < Vectors; y += 2) {
      p.a = whole.a + x * whole.a_block;
      p.b = whole.b + y * kTile;
      p.c = whole.c + x * kTile * whole.lanes + y * kTile;
      if constexpr (Start == TileStart::kLanes) p.start = whole.start + y * kTile;
      if (y + 1 < Vectors) {
        two_rows ? tile_block<Tiles, Start, true, true>(p)
                 : tile_block<Tiles, Start, false, true>(p);
      } else {
        two_rows ? tile_block<Tiles, Start, true, false>(p)
                 : tile_block<Tiles, Start, false, false>(p);
      }
    }
  }
}

// Zeros in the rows of P past `rows` that belong to its last tile.
template <int Vectors>
PERMATTN_INLINE void fill_last_tile(float* p, int rows) {
  for (int i = rows; i < round_up(rows, kTile); ++i) {
    for (int y = 0; y < Vectors; ++y) store(p + (i * Vectors + y) * kWidth, VecF{});
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
    tile_gemm<Bf16Tiles, Vectors, TileStart::kZeros>(
        {k, kTile * k_stride, kTile, k_stride, q, s, kLanes, steps / kTile},
        (count + kTile - 1) / kTile);
    if (count % 2 != 0) {
      for (int y = 0; y < kLanes; y += kWidth) store(s + count * kLanes + y, splat(-kInfinity));
    }
  }

  // As Bf16Math's, and zeros in the rows that fill the last tile.
  template <int Vectors>
  PERMATTN_INLINE void narrow(float* p, int count) {
    Base::template narrow<Vectors>(p, count);
    fill_last_tile<Vectors>(p, (count + 1) / 2);
  }

  template <int Vectors>
  PERMATTN_INLINE void probabilities(float* s, int count, float c, const VecF* top, VecF* sum) {
    Base::template probabilities<Vectors>(s, count, c, top, sum);
    fill_last_tile<Vectors>(s, (count + 1) / 2);
  }

  template <int Vectors>
  PERMATTN_INLINE void values(const float* v, int64_t, const float* p, float* o, int count,
                              int64_t dim_v) {
    const int64_t blocks = (dim_v + kTile - 1) / kTile;
    const int64_t steps = (count + 2 * kTile - 1) / (2 * kTile);
    tile_gemm<Bf16Tiles, Vectors, TileStart::kSums>(
        {v, kTileFloats, blocks * kTileFloats, kTile, p, o, Vectors * kWidth, steps}, blocks);
  }
};
