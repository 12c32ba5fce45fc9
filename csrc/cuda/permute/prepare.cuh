// The kernel of prepare.h: a block makes the rows of whole groups ready.
#pragma once
#include "row_writer.cuh"

namespace permattn::permute {

constexpr float kLeastMaximum = 1e-30F;  // core.quant.LEAST_MAXIMUM

// Maxima of groups, or of their columns, and then inverses of scales.
struct GroupScales : TilePlace {
  uint32_t* high;  // shared memory, [groups][high_stride]

  PERMATTN_DEVICE GroupScales(const TilePlace& place, uint32_t* shared)
      : TilePlace(place), high(shared) {}

  PERMATTN_DEVICE uint32_t* of_group(int32_t group) const {
    return high + group * args.shared.high_stride;
  }
  // Where a column's number lies: threads of a row find theirs side by side.
  PERMATTN_DEVICE int32_t place_of_column(int32_t column) const {
    return column % kChunk * lanes() + column / kChunk;
  }

  PERMATTN_DEVICE void clear() const {
    const int32_t count = args.tiling.groups * args.shared.high_stride;
    for (auto at = static_cast<int32_t>(threadIdx.x); at < count; at += args.tiling.threads) {
      high[at] = 0;
    }
  }

  // Their bits order magnitudes, NaN last.
  PERMATTN_DEVICE void add(int32_t quad, const float (&x)[kQuad][kChunk]) const {
    if (p.per_column) {
      add_columns(quad, x);
      return;
    }
    uint32_t most = 0;
#pragma unroll
    for (int s = 0; s < kQuad; ++s) {
      if (!is_one_group()) most = 0;
#pragma unroll
      for (float each : x[s]) most = larger(most, magnitude_bits(each));
      if (!is_one_group()) raise_group(row_of(quad, s), most);
    }
    if (is_one_group()) raise_group(0, most);
  }

  PERMATTN_DEVICE void add_columns(int32_t quad, const float (&x)[kQuad][kChunk]) const {
    uint32_t most[kChunk] = {};
#pragma unroll
    for (int s = 0; s < kQuad; ++s) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        most[j] = larger(is_one_group() ? most[j] : 0, magnitude_bits(x[s][j]));
      }
      if (!is_one_group()) raise_columns(row_of(quad, s), most);
    }
    if (is_one_group()) raise_columns(0, most);
  }

  PERMATTN_DEVICE void raise_columns(int32_t row, uint32_t (&most)[kChunk]) const {
    bool is_last = true;
    if (is_one_group()) {
      // Rows of a warp meet first.
      for (int32_t mask = lanes(); mask < 32; mask *= 2) {
#pragma unroll
        for (uint32_t& each : most) each = larger(each, shuffle_xor(each, mask));
      }
      is_last = static_cast<int32_t>(threadIdx.x) % 32 < lanes();
    }
    if (!is_last || row >= args.tiling.rows()) return;
    uint32_t* to = of_group(group_of(row)) + lane;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) raise_to(to + j * lanes(), most[j]);
  }

  PERMATTN_DEVICE void raise_group(int32_t row, uint32_t most) const {
    for (int32_t mask = lanes() / 2; mask > 0; mask /= 2) {
      most = larger(most, shuffle_xor(most, mask));
    }
    if (lane != 0 || row >= args.tiling.rows()) return;
    raise_to(of_group(group_of(row)), most);
  }

  // Scales go to memory, and their inverses where the maxima were. The reciprocal is rounded before
  // it is multiplied, as torch does.
  PERMATTN_DEVICE void find() const {
    const int32_t columns = p.per_column ? p.dim : 1;
    const auto stride = static_cast<int32_t>(p.per_column ? p.scale_stride : 1);
    const int64_t groups = args.tiling.num_groups;
    for (int32_t group = 0; group < args.tiling.groups; ++group) {
      uint32_t* numbers = of_group(group);
      float* to = p.scales + (head * groups + first_group + group) * stride;
      for (auto d = static_cast<int32_t>(threadIdx.x); d < columns; d += args.tiling.threads) {
        uint32_t& place = numbers[p.per_column ? place_of_column(d) : 0];
        const float most = ptx::float_from_bits(place);
        const bool is_zero = most < kLeastMaximum;
        place = ptx::bits_of(is_zero ? 0.0F : product(quotient(1.0F, most), args.high));
        if (first_group + group < groups) to[d] = is_zero ? 0.0F : quotient(most, args.high);
      }
    }
  }

  PERMATTN_DEVICE void load_inverses(int32_t row, float (&inverse)[kChunk]) const {
    const int32_t last = args.tiling.groups - 1, group = group_of(row);
    const uint32_t* from = of_group(group < last ? group : last);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      inverse[j] = ptx::float_from_bits(from[p.per_column ? j * lanes() + lane : 0]);
    }
  }
};

// kHolds: a thread's rows stay in registers, four of them. Else there are more, and they are made
// twice: for the maxima, and to be written; the second time they lie in the caches.
template <Dtype kDtype, bool kHolds, bool kTransformed>
struct RowMaker {
  using Reader = RowLoader<kDtype>;
  using Storage = typename Reader::Storage;
  using Chunk = typename Reader::Chunk;
  using T = Type<kDtype>;
  // Tables of columns stay in registers, too, where there is room.
  static constexpr bool kHoldsTables = kHolds && kDtype != Dtype::kFloat32;
  using Table = ColumnTable<kHoldsTables>;
  using Transformer = permute::RowTransform<kHoldsTables>;

  const TilePlace& place;
  const PrepareArgs& args;
  const PrepareParams& p;
  const Reader& reader;
  const int32_t* token_of_slot;  // or null
  Transformer transform;
  const float* against;  // of dots; or null
  Table mean;
  ColumnTable<false> factor;  // rarer

  PERMATTN_DEVICE RowMaker(const TilePlace& tile, const Reader& rows, const int32_t* tokens,
                           float* exchange)
      : place(tile),
        args(tile.args),
        p(tile.p),
        reader(rows),
        token_of_slot(tokens),
        transform(rows, args.whole, kTransformed, exchange),
        against(kTransformed && p.dots != nullptr ? p.dot_with + place_of_head(p.dot_group) * p.dim
                                                  : nullptr),
        mean(table_of<Table>(p.mean)),
        factor(table_of<ColumnTable<false>>(p.factor)) {}

  // Of a table [B, H, D].
  template <class AnyTable>
  PERMATTN_DEVICE AnyTable table_of(const float* table) const {
    if (table != nullptr) table += place_of_head(1) * p.dim;
    return AnyTable(table, reader.first_column(), p.dim, args.whole.columns);
  }
  // Of [B, H / each].
  PERMATTN_DEVICE int64_t place_of_head(int64_t each) const {
    const auto heads = static_cast<uint32_t>(p.heads), size = static_cast<uint32_t>(each);
    return reader.b * (heads / size) + static_cast<uint32_t>(reader.h) / size;
  }

  PERMATTN_DEVICE void write_dot(int32_t token, const float (&row)[kChunk]) const {
    float with[kChunk], dot = 0.0F;
    load_floats(against + reader.first_column(), reader.columns_left(), args.whole.columns, with);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) dot += row[j] * with[j];
    dot = row_sum(dot, reader.lanes);
    if (reader.lane == 0 && token >= 0) p.dots[place_of_head(1) * p.tokens + token] = dot;
  }

  PERMATTN_DEVICE int32_t token_of(int32_t row) const {
    const int32_t slot = place.first_slot + row;
    if (row >= args.tiling.rows() || slot >= p.slots) return -1;
    const int32_t token = token_of_slot == nullptr ? slot : token_of_slot[slot];
    return token < p.tokens ? token : -1;
  }

  // A row as floats: transformed, smoothed; zeros for a hole.
  PERMATTN_DEVICE void make_row(int32_t token, const Chunk& chunk, float (&row)[kChunk]) const {
    T::unpack(chunk, row);
    if constexpr (kTransformed) {
      transform.apply(token, row);
      if (against != nullptr) write_dot(token, row);
    }
    float by_column[kChunk];
    if (mean.is_there()) {
      mean.get(by_column);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) row[j] = difference(row[j], by_column[j]);
    }
    if (factor.is_there()) {
      factor.get(by_column);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) row[j] = product(row[j], by_column[j]);
    }
    if (token >= 0) return;
#pragma unroll
    for (float& each : row) each = 0.0F;
  }

  // Everything is asked for before anything is waited for.
  PERMATTN_DEVICE void load(int32_t quad, int32_t (&token)[kQuad], Chunk (&chunk)[kQuad]) const {
#pragma unroll
    for (int s = 0; s < kQuad; ++s) token[s] = token_of(place.row_of(quad, s));
#pragma unroll
    for (int s = 0; s < kQuad; ++s) reader.load(token[s], chunk[s]);
  }

  PERMATTN_DEVICE void make(int32_t quad, float (&x)[kQuad][kChunk]) const {
    int32_t token[kQuad];
    Chunk chunk[kQuad];
    load(quad, token, chunk);
#pragma unroll
    for (int s = 0; s < kQuad; ++s) make_row(token[s], chunk[s], x[s]);
  }

  // Rows of x's own type. What is only moved keeps its bits, NaN's too.
  PERMATTN_DEVICE void move(int32_t quad, const RowWriter& writer) const {
    const bool is_moved = !kTransformed && !mean.is_there() && !factor.is_there();
    int32_t token[kQuad];
    Chunk chunk[kQuad];
    load(quad, token, chunk);
#pragma unroll
    for (int s = 0; s < kQuad; ++s) {
      if (!is_moved) {
        float row[kChunk];
        make_row(token[s], chunk[s], row);
        T::pack(row, chunk[s]);
      }
      writer.template store_chunk<Storage>(place.row_of(quad, s), chunk[s]);
    }
  }
};

// Scales rows and writes them, or stages them.
PERMATTN_DEVICE void write_quad(const GroupScales& scales, const RowWriter& writer, int32_t quad,
                                float (&x)[kQuad][kChunk]) {
  const PrepareParams& p = writer.p;
  float inverse[kChunk];
  if (writer.is_one_group()) scales.load_inverses(0, inverse);
#pragma unroll
  for (int s = 0; s < kQuad; ++s) {
    const int32_t row = writer.row_of(quad, s);
    if (!writer.is_one_group()) scales.load_inverses(row, inverse);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) x[s][j] = product(x[s][j], inverse[j]);
    if (p.layout == Layout::kRows) writer.store_bytes(row, x[s]);
    if (p.layout == Layout::kNibbleRows) writer.store_nibbles(row, x[s]);
  }
  if (p.layout == Layout::kFragments) writer.stage_quad(quad, x);
}

template <Dtype kDtype, bool kHolds, bool kTransformed>
PERMATTN_DEVICE void prepare(const PrepareArgs& args, char* shared) {
  using Maker = RowMaker<kDtype, kHolds, kTransformed>;
  const PrepareParams& p = args.p;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto heads = static_cast<uint32_t>(p.out_heads);
  const auto tiles = static_cast<uint32_t>(args.tiling.tiles);
  // Heads of one token often lie side by side.
  const uint32_t h = blockIdx.x % heads, tile = blockIdx.x / heads % tiles;
  const uint32_t b = blockIdx.x / heads / tiles;
  const TilePlace place{args,
                        p,
                        static_cast<int32_t>(b * heads + h),
                        static_cast<int32_t>(tile) * args.tiling.rows(),
                        static_cast<int32_t>(tile) * args.tiling.groups,
                        thread / args.tiling.lanes,
                        thread % args.tiling.lanes};
  const typename Maker::Reader reader{
      p,
      static_cast<int32_t>(b),
      static_cast<int32_t>(h / (heads / static_cast<uint32_t>(p.heads))),
      args.tiling.lanes,
      place.lane,
      args.whole.x};
  auto* exchange = reinterpret_cast<float*>(shared + args.shared.exchange_offset);
  Maker maker(place, reader, p.token_of_slot.data == nullptr ? nullptr : p.token_of_slot.row(b, h),
              exchange + thread / 32 * (32 * kChunk));
  const RowWriter writer(place, shared + args.shared.staged_offset);
  if (p.format == Format::kNone) {
    for (int32_t i = 0; i < args.tiling.quads_per_thread; ++i) maker.move(place.quad_of(i), writer);
    return;
  }
  const GroupScales scales(place, reinterpret_cast<uint32_t*>(shared));
  scales.clear();
  __syncthreads();
  float x[kQuad][kChunk];
  const int32_t quads = kHolds ? 1 : args.tiling.quads_per_thread;
  for (int32_t i = 0; i < quads; ++i) {
    maker.make(place.quad_of(i), x);
    scales.add(place.quad_of(i), x);
  }
  __syncthreads();
  scales.find();
  __syncthreads();
  maker.against = nullptr;
  for (int32_t i = 0; i < quads; ++i) {
    if constexpr (!kHolds) maker.make(place.quad_of(i), x);
    write_quad(scales, writer, place.quad_of(i), x);
  }
  if (p.layout != Layout::kFragments) return;
  __syncthreads();
  writer.store_staged();
}

}  // namespace permattn::permute
