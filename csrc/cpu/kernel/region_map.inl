// Regions of maps into packed rows and lanes. H heads lie side by side: a step of a packed row is H
// numbers of 4 bytes, one for each head, and lane `query * H + head` holds a query of a head.

constexpr int kMaxLanes = kMaxPanel * kWidth;

// H numbers, over and over.
template <int H>
PERMATTN_INLINE VecF broadcast(const float* p) {
  static_assert(H <= kWidth);
  if constexpr (H == 1) {
    return splat(*p);
  } else if constexpr (H == kWidth) {
    return load_unaligned(p);
#if PERMATTN_WIDTH == 16
  } else if constexpr (H == 2) {
    return reinterpret_cast<VecF>(_mm512_castpd_ps(_mm512_broadcastsd_pd(
        _mm_castps_pd(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))))));
  } else if constexpr (H == 4) {
    return reinterpret_cast<VecF>(_mm512_broadcast_f32x4(_mm_loadu_ps(p)));
  } else {
    return reinterpret_cast<VecF>(_mm512_broadcast_f32x8(_mm256_loadu_ps(p)));
#elif PERMATTN_WIDTH == 8
  } else if constexpr (H == 2) {
    return reinterpret_cast<VecF>(_mm256_castpd_ps(_mm256_broadcastsd_pd(
        _mm_castsi128_pd(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))));
  } else {
    const __m128 four = _mm_loadu_ps(p);
    return reinterpret_cast<VecF>(_mm256_insertf128_ps(_mm256_castps128_ps256(four), four, 1));
#endif
#if PERMATTN_WIDTH == 4
  }
  else {
    return VecF{p[0], p[1], p[0], p[1]};
#endif
  }
}

// [H][kWidth] to [kWidth][H]: a perfect shuffle of all rows per bit of H.
template <int H, int Stages>
PERMATTN_INLINE void shuffle_rows(VecF* rows) {
#pragma GCC unroll 4
  for (int stage = 0; stage < Stages; ++stage) {
    VecF shuffled[H];
#pragma GCC unroll 4
    for (int i = 0; i < H / 2; ++i) {
      shuffled[2 * i] = interleave_low(rows[i], rows[i + H / 2]);
      shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + H / 2]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i) rows[i] = shuffled[i];
  }
}

constexpr int log2_of(int x) { return x == 1 ? 0 : 1 + log2_of(x / 2); }

template <int H>
PERMATTN_INLINE void heads_abreast(VecF* rows) {
  if constexpr (H > 1) shuffle_rows<H, log2_of(H)>(rows);
}

// The inverse: shuffles go round.
template <int H>
PERMATTN_INLINE void heads_apart(VecF* rows) {
  if constexpr (H > 1) shuffle_rows<H, log2_of(kWidth)>(rows);
}

// The cells of a box inside the map, numbered without gaps.
struct Box {
  int64_t start[3], extent[3];

  Box(const RegionGrid& grid, int64_t region) {
    const int64_t at[3] = {region / (grid.counts[1] * grid.counts[2]),
                           region / grid.counts[2] % grid.counts[1], region % grid.counts[2]};
    for (int i = 0; i < 3; ++i) {
      start[i] = at[i] * grid.box[i];
      const int64_t left = grid.size[i] - start[i];
      extent[i] = left < grid.box[i] ? left : grid.box[i];
    }
  }

  int64_t cells() const { return extent[0] * extent[1] * extent[2]; }
};

// Walks through the cells of a box.
struct Cell {
  const Box& box;
  int64_t t, h, w;

  Cell(const Box& of, int64_t i)
      : box(of),
        t(i / (of.extent[1] * of.extent[2])),
        h(i / of.extent[2] % of.extent[1]),
        w(i % of.extent[2]) {}

  PERMATTN_METHOD void next() {
    if (++w < box.extent[2]) return;
    w = 0;
    if (++h < box.extent[1]) return;
    h = 0;
    ++t;
  }

  PERMATTN_METHOD int64_t offset(const MapView& map) const {
    return (box.start[0] + t) * map.stride_t + (box.start[1] + h) * map.stride_h +
           (box.start[2] + w) * map.stride_w;
  }

  PERMATTN_METHOD int64_t token(const RegionGrid& grid) const {
    return ((box.start[0] + t) * grid.size[1] + box.start[1] + h) * grid.size[2] + box.start[2] + w;
  }
};

// Rows of some heads of a map; a row with a stride is copied first.
template <class Storage>
struct MapRows {
  const Storage* base;
  int64_t stride_m, stride_d, dim;

  MapRows(const MapView& map, int64_t b, int64_t m, int64_t width)
      : base(static_cast<const Storage*>(map.data) + b * map.stride_b + m * map.stride_m),
        stride_m(map.stride_m),
        stride_d(map.stride_d),
        dim(width) {}

  PERMATTN_METHOD const Storage* row(int64_t offset, int64_t head, Storage* copy) const {
    const Storage* from = base + offset + head * stride_m;
    if (stride_d == 1) return from;
    for (int64_t d = 0; d < dim; ++d) copy[d] = from[d * stride_d];
    return copy;
  }
};

// Copies of rows with a stride: both rows of a pair, for every lane.
template <class Storage>
struct Copies {
  alignas(64) Storage rows[2 * kWidth][kMaxHeadDim];
};

template <class Type>
PERMATTN_INLINE void write_map_row(typename Type::Storage* to, int64_t stride_d, const float* row,
                                   int64_t dim) {
  if (stride_d == 1) {
    for (int64_t d = 0; d < dim; d += kWidth) store_up_to<Type>(to + d, load(row + d), dim - d);
  } else {
    for (int64_t d = 0; d < dim; ++d) Type::store_one(to + d * stride_d, row[d]);
  }
}

// How inputs of a type become the steps of an inner product.
template <class Math>
struct Steps;

template <class Type>
struct Steps<FloatMath<Type>> {
  using Storage = typename Type::Storage;
  using Arithmetic = FloatMath<Float32>;  // the same code for every type

  PERMATTN_INLINE VecF read(const Storage* row, int64_t d, int64_t dim) {
    return load_up_to<Type>(row + d, dim - d);
  }
  PERMATTN_INLINE VecF with_sign(VecF x, float sign) { return x * sign; }
  PERMATTN_INLINE VecF columns(const Storage* even, const Storage*, int64_t d, int64_t dim) {
    return load_up_to<Type>(even + d, dim - d);
  }

  // S[count][lane] to what multiplies V, in place; adds up 2^(s * c - top).
  template <int Vectors>
  PERMATTN_INLINE void probabilities(float* s, int count, float c, const VecF* top, VecF* sum) {
    Arithmetic::template probabilities<Vectors>(s, count, c, top, sum);
  }
};

PERMATTN_INLINE constexpr int64_t padded(int64_t x) { return round_up(x, kWidth); }

// Sizes of packed rows, in floats.
template <class Math, int H>
struct RowSizes {
  int64_t steps;       // of Q K^T
  int64_t key, value;  // a row of keys, and a step of values
  int64_t keys;        // of a region, the last one paired where steps are pairs
  int64_t region;      // its keys, then its values

  explicit RowSizes(const RegionParams& p) {
    steps = (p.head_dim + Math::kPerStep - 1) / Math::kPerStep;
    key = padded(steps) * H;
    value = padded(p.head_dim_v) * H;
    keys = round_up(p.kv_grid.cells(), Math::kPerStep);
    region = keys * key + keys / Math::kPerStep * value;
  }
};

// Rows of one token of all heads as [step][H].
template <class Math, int H>
PERMATTN_INLINE void pack_token(const MapRows<typename Math::Storage>& rows, int64_t offset,
                                Copies<typename Math::Storage>& copies, float* to) {
  const typename Math::Storage* row[H];
  for (int h = 0; h < H; ++h) row[h] = rows.row(offset, h, copies.rows[h]);
  for (int64_t d = 0; d < rows.dim; d += kWidth * Math::kPerStep) {
    VecF r[H];
    for (int h = 0; h < H; ++h) r[h] = Steps<Math>::read(row[h], d, rows.dim);
    heads_abreast<H>(r);
    for (int h = 0; h < H; ++h) store(to + d / Math::kPerStep * H + h * kWidth, r[h]);
  }
}

// Keys that a region offers.
PERMATTN_INLINE int64_t num_keys(const RegionParams& p, int64_t region) {
  return p.count_padding ? p.kv_grid.cells() : Box(p.kv_grid, region).cells();
}

// The cells of a region as [key][step][H], then [step of keys][column][H]. Cells outside the map
// are zeros behind the others, where they count, and left out where they do not.
template <class Math, int H>
static __attribute__((noinline)) void pack_region(const RegionParams& p, int64_t b, int64_t m,
                                                  int64_t region, float* to) {
  using Storage = typename Math::Storage;
  constexpr int kPerStep = Math::kPerStep;
  const RowSizes<Math, H> size(p);
  const MapRows<Storage> k(p.k, b, m, p.head_dim), v(p.v, b, m, p.head_dim_v);
  const Box box(p.kv_grid, region);
  const int64_t cells = box.cells();
  const int64_t keys = round_up(num_keys(p, region), kPerStep);
  Copies<Storage> copies;
  Cell key(box, 0);
  for (int64_t i = 0; i < cells; ++i, key.next()) {
    pack_token<Math, H>(k, key.offset(p.k), copies, to + i * size.key);
  }
  for (int64_t i = cells * size.key; i < keys * size.key; i += kWidth) store(to + i, VecF{});
  float* values = to + size.keys * size.key;
  Cell value(box, 0);
  for (int64_t i = 0; i < cells; i += kPerStep, values += size.value) {
    const Storage *even[H], *odd[H];
    for (int h = 0; h < H; ++h) even[h] = v.row(value.offset(p.v), h, copies.rows[h]);
    value.next();
    const bool is_paired = kPerStep == 2 && i + 1 < cells;
    for (int h = 0; h < H; ++h) {
      odd[h] = is_paired ? v.row(value.offset(p.v), h, copies.rows[kWidth + h]) : nullptr;
    }
    if (is_paired) value.next();
    for (int64_t d = 0; d < p.head_dim_v; d += kWidth) {
      VecF r[H];
      for (int h = 0; h < H; ++h) r[h] = Steps<Math>::columns(even[h], odd[h], d, p.head_dim_v);
      heads_abreast<H>(r);
      for (int h = 0; h < H; ++h) store(values + d * H + h * kWidth, r[h]);
    }
  }
  const float* end = to + size.keys * size.key + keys / kPerStep * size.value;
  for (; values < end; values += kWidth) store(values, VecF{});
}

// Queries [first, first + count) of a box as B[step][lane], zeros in lanes beyond them.
template <class Math, int H>
PERMATTN_INLINE void pack_queries(const MapView& map, int64_t b, int64_t m, int64_t dim,
                                  const Box& box, int64_t first, int64_t count, int vectors,
                                  float sign, float* to) {
  using Storage = typename Math::Storage;
  constexpr int kQueries = kWidth / H;  // of a vector
  const MapRows<Storage> rows(map, b, m, dim);
  const int64_t steps = (dim + Math::kPerStep - 1) / Math::kPerStep;
  const int64_t lanes = vectors * kWidth;
  Copies<Storage> copies;
  Cell cell(box, first);
  for (int y = 0; y < vectors; ++y) {
    const Storage* row[kWidth];
    for (int j = 0; j < kQueries; ++j) {
      const bool used = y * kQueries + j < count && sign != 0.0F;
      for (int h = 0; h < H; ++h) {
        const int lane = j * H + h;
        row[lane] = used ? rows.row(cell.offset(map), h, copies.rows[lane]) : nullptr;
      }
      if (used) cell.next();
    }
    for (int64_t u = 0; u < steps; u += kWidth) {
      VecF r[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        r[i] = row[i] == nullptr ? VecF{}
                                 : Steps<Math>::with_sign(
                                       Steps<Math>::read(row[i], u * Math::kPerStep, dim), sign);
      }
      transpose(r);
      const int64_t n = steps - u < kWidth ? steps - u : kWidth;
      for (int64_t i = 0; i < n; ++i) store(to + (u + i) * lanes + y * kWidth, r[i]);
    }
  }
}

// The same queries as [query][step][H].
template <class Math, int H>
PERMATTN_INLINE void pack_rows_of(const MapView& map, int64_t b, int64_t m, int64_t dim,
                                  const Box& box, int64_t first, int64_t count, float* to) {
  const MapRows<typename Math::Storage> rows(map, b, m, dim);
  const int64_t row = padded((dim + Math::kPerStep - 1) / Math::kPerStep) * H;
  Copies<typename Math::Storage> copies;
  Cell cell(box, first);
  for (int64_t i = 0; i < count; ++i, cell.next()) {
    pack_token<Math, H>(rows, cell.offset(map), copies, to + i * row);
  }
}
