// Products of bytes on AMX tiles: 16 rows of 64 bytes. Twin of VectorProducts, to the last bit.
struct TileProducts {
  using Bytes = VnniBytes;
  static constexpr int kStepBlock = kTile;
  static constexpr Layout kValueLayout = Layout::kTiles;

  template <int Vectors>
  PERMATTN_INLINE void scores(const std::byte* k, int64_t k_stride, const float* q,
                              const float* start, float* s, int count, int64_t steps) {
    const int64_t row = k_stride / 4;
    const auto* a = reinterpret_cast<const float*>(k);
    tile_gemm<UnsignedSignedTiles, Vectors, TileStart::kLanes>(
        {a, kTile * row, kTile, row, q, s, Vectors * kWidth, steps / kTile, start},
        (count + kTile - 1) / kTile);
  }

  // V as [64 slots][16 columns] tiles; `product` is scratch for C.
  template <int Vectors>
  PERMATTN_INLINE void values(const std::byte* v, int64_t columns, float* p, int quads,
                              int64_t dim_v, float* product, const ValueSums<Vectors>& sums) {
    fill_last_tile<Vectors>(p, quads);
    const int64_t blocks = columns / kTile;
    const auto* a = reinterpret_cast<const float*>(v);
    tile_gemm<SignedUnsignedTiles, Vectors, TileStart::kZeros>(
        {a, kTileFloats, blocks * kTileFloats, kTile, p, product, Vectors * kWidth,
         (quads + kTile - 1) / kTile},
        blocks);
    for (int64_t d = 0; d < dim_v; ++d) {
      for (int y = 0; y < Vectors; ++y) {
        sums.add(d, y, load_ints(product + (d * Vectors + y) * kWidth));
      }
    }
  }
};
