// The kernel of prepare.h: a block makes the rows of whole groups ready, out of registers.
#pragma once
#include "row_reader.cuh"

namespace permattn::permute {

using cuda::kQuad;
using cuda::PrepareArgs;

constexpr float kLeastMaximum = 1e-30F;  // core.quant.LEAST_MAXIMUM

// The rows of one thread: kQuads times four of a tile, and eight columns.
template <Dtype kDtype, int kQuads>
struct Tile {
  using Reader = RowReader<kDtype>;
  using T = Type<kDtype>;

  const PrepareArgs& args;
  const PrepareParams& p;
  const Reader& reader;
  int32_t head;        // of the result, over batches
  int32_t first_slot;  // of the tile
  int32_t first_group;
  int32_t unit;    // of threads of a row
  uint32_t* high;  // shared memory, [groups][high_stride]: bits of maxima, then inverses of scales
  char* staged;    // shared memory, a tile of kFragments

  float x[kQuads][kQuad][kChunk];

  PERMATTN_DEVICE int32_t quad_of(int i) const {
    return unit + i * (args.tiling.threads / args.tiling.lanes);
  }
  // A row of the tile.
  PERMATTN_DEVICE int32_t row_of(int i, int s) const {
    const int32_t quad = quad_of(i);
    return quad / 4 * 16 + quad % 4 * 2 + s % 2 + s / 2 * 8;
  }
  PERMATTN_DEVICE bool is_row(int32_t row) const {
    return row < args.tiling.rows() && first_slot + row < p.padded_slots;
  }
  PERMATTN_DEVICE uint32_t* high_of_group(int32_t group) const {
    return high + group * args.shared.high_stride;
  }

  PERMATTN_DEVICE int32_t token_of(int32_t row, const int32_t* token_of_slot) const {
    const int32_t slot = first_slot + row;
    if (row >= args.tiling.rows() || slot >= p.slots) return -1;
    const int32_t token = token_of_slot == nullptr ? slot : token_of_slot[slot];
    return token < p.tokens ? token : -1;
  }

  // Everything is asked for before anything is waited for.
  PERMATTN_DEVICE void load(const int32_t* token_of_slot, int32_t (&token)[kQuads][kQuad],
                            typename Reader::Chunk (&chunk)[kQuads][kQuad]) const {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
#pragma unroll
      for (int s = 0; s < kQuad; ++s) token[i][s] = token_of(row_of(i, s), token_of_slot);
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
#pragma unroll
      for (int s = 0; s < kQuad; ++s) reader.load(token[i][s], chunk[i][s]);
    }
  }

  PERMATTN_DEVICE void write_dot(int32_t token, const float (&row)[kChunk]) const {
    float with[kChunk], dot = 0.0F;
    reader.load_column_of_head(p.dot_with, p.dot_group, with);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) dot += row[j] * with[j];
    dot = row_sum(dot, reader.lanes);
    if (reader.lane == 0 && token >= 0) {
      p.dots[(static_cast<int64_t>(reader.b) * p.heads + reader.h) * p.tokens + token] = dot;
    }
  }

  template <bool kTransformed>
  PERMATTN_DEVICE void make_row(int32_t token, const typename Reader::Chunk& chunk,
                                float (&row)[kChunk]) const {
    T::unpack(chunk, row);
    if constexpr (kTransformed) {
      reader.transform(token, row);
      if (p.dots != nullptr) write_dot(token, row);
    }
    float by_column[kChunk];
    if (p.mean != nullptr) {
      reader.load_column_of_head(p.mean, 1, by_column);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) row[j] = difference(row[j], by_column[j]);
    }
    if (p.factor != nullptr) {
      reader.load_column_of_head(p.factor, 1, by_column);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) row[j] = product(row[j], by_column[j]);
    }
    if (token >= 0) return;
#pragma unroll
    for (float& each : row) each = 0.0F;
  }

  // Largest magnitudes of groups, or of their columns. Their bits order them, NaN last.
  PERMATTN_DEVICE void find_maxima() const {
    const bool is_one = args.tiling.groups == 1;
    if (p.per_column) {
      uint32_t most[kChunk] = {};
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
#pragma unroll
        for (int s = 0; s < kQuad; ++s) {
          if (!is_one) {
#pragma unroll
            for (uint32_t& each : most) each = 0;
          }
#pragma unroll
          for (int j = 0; j < kChunk; ++j) most[j] = larger(most[j], magnitude_bits(x[i][s][j]));
          if (!is_one) raise_columns(row_of(i, s), most);
        }
      }
      if (is_one) raise_columns(0, most);
      return;
    }
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
#pragma unroll
      for (int s = 0; s < kQuad; ++s) {
        if (!is_one) most = 0;
#pragma unroll
        for (float each : x[i][s]) most = larger(most, magnitude_bits(each));
        if (!is_one) raise_group(row_of(i, s), most);
      }
    }
    if (is_one) raise_group(0, most);
  }

  PERMATTN_DEVICE void raise_columns(int32_t row, const uint32_t (&most)[kChunk]) const {
    if (row >= args.tiling.rows()) return;
    uint32_t* to = high_of_group(row / args.tiling.rows_per_group) + reader.first_column();
#pragma unroll
    for (int j = 0; j < kChunk; ++j) raise_to(to + j, most[j]);
  }

  PERMATTN_DEVICE void raise_group(int32_t row, uint32_t most) const {
    for (int32_t mask = reader.lanes / 2; mask > 0; mask /= 2) {
      most = larger(most, shuffle_xor(most, mask));
    }
    if (reader.lane != 0 || row >= args.tiling.rows()) return;
    raise_to(high_of_group(row / args.tiling.rows_per_group), most);
  }

  // Scales go to memory, and their inverses where the maxima were. The reciprocal is rounded before
  // it is multiplied, as torch does.
  PERMATTN_DEVICE void find_scales() const {
    const int32_t stride = args.shared.high_stride;
    const int64_t groups = args.tiling.num_groups;
    for (auto at = static_cast<int32_t>(threadIdx.x); at < args.tiling.groups * stride;
         at += args.tiling.threads) {
      const int32_t group = first_group + at / stride, column = at % stride;
      const float most = ptx::float_from_bits(high[at]);
      const bool is_zero = most < kLeastMaximum;
      const float inverse = is_zero ? 0.0F : product(quotient(1.0F, most), args.high);
      high[at] = ptx::bits_of(inverse);
      if (group >= groups) continue;
      float* to = p.scales + (head * groups + group) * (p.per_column ? p.scale_stride : 1);
      const float scale = is_zero ? 0.0F : quotient(most, args.high);
      if (!p.per_column || column < p.scale_stride) to[column] = scale;
    }
  }

  PERMATTN_DEVICE void scale_row(int32_t row, float (&values)[kChunk]) const {
    const int32_t last = args.tiling.groups - 1, group = row / args.tiling.rows_per_group;
    const uint32_t* inverse = high_of_group(group < last ? group : last);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const uint32_t bits = inverse[p.per_column ? reader.first_column() + j : 0];
      values[j] = clamped(product(values[j], ptx::float_from_bits(bits)), args.high);
    }
  }

  PERMATTN_DEVICE char* row_start(int32_t row, int32_t size) const {
    return static_cast<char*>(p.rows) + head * p.head_stride +
           (static_cast<int64_t>(first_slot + row) * p.row_stride + reader.first_column()) * size;
  }

  // Rows in the caller's type.
  PERMATTN_DEVICE void store_chunk(int32_t row, const typename Reader::Chunk& chunk) const {
    using Storage = typename Reader::Storage;
    const int32_t left = reader.columns_left();
    if (!is_row(row) || left <= 0) return;
    auto* to = reinterpret_cast<Storage*>(row_start(row, sizeof(Storage)));
    if (args.whole_rows) {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(chunk) / sizeof(Words)); ++i) {
        reinterpret_cast<Words*>(to)[i] = chunk[i];
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (j >= left) continue;
      if constexpr (sizeof(Storage) == 2) {
        to[j] = static_cast<uint16_t>(chunk[0].x[j / 2] >> (j % 2 * 16));
      } else {
        to[j] = ptx::float_from_bits(chunk[j / 4].x[j % 4]);
      }
    }
  }

  PERMATTN_DEVICE uint32_t word_of(float x0, float x1, float x2, float x3) const {
    return p.format == Format::kFp8 ? e4m3_word(x0, x1, x2, x3) : integer_word(x0, x1, x2, x3);
  }

  // A byte a number.
  PERMATTN_DEVICE void store_bytes(int32_t row, const float (&v)[kChunk]) const {
    const int32_t left = reader.columns_left();
    if (!is_row(row) || left <= 0) return;
    char* to = row_start(row, 1);
    const uint32_t words[2] = {word_of(v[0], v[1], v[2], v[3]), word_of(v[4], v[5], v[6], v[7])};
    if (args.whole_rows) {
      *reinterpret_cast<uint64_t*>(to) = static_cast<uint64_t>(words[1]) << 32 | words[0];
      return;
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (j < left) to[j] = static_cast<char>(words[j / 4] >> (j % 4 * 8));
    }
  }

  PERMATTN_DEVICE void store_nibbles(int32_t row, const float (&v)[kChunk]) const {
    const int32_t left = reader.columns_left();
    if (!is_row(row) || left <= 0) return;
    char* to = static_cast<char*>(p.rows) + head * p.head_stride +
               (static_cast<int64_t>(first_slot + row) * p.row_stride + reader.first_column()) / 2;
    const uint32_t word = nibble_half(v[0], v[1], v[2], v[3]) | nibble_half(v[4], v[5], v[6], v[7])
                                                                    << 16;
    if (args.whole_rows) {
      *reinterpret_cast<uint32_t*>(to) = word;
      return;
    }
#pragma unroll
    for (int j = 0; j < kChunk; j += 2) {
      if (j < left) to[j / 2] = static_cast<char>(word >> (j * 4));
    }
  }

  // Four neighbours of every column, where they stand in kFragments.
  PERMATTN_DEVICE void stage_quad(int i) const {
    const int32_t first = row_of(i, 0), group = first / args.tiling.rows_per_group;
    if (first >= args.tiling.rows()) return;
    const int32_t quad = (first - group * args.tiling.rows_per_group) / 16 * 4 + quad_of(i) % 4;
    char* to =
        staged + (group * reader.lanes * kChunk + reader.first_column()) * args.shared.column_bytes;
    const bool is_half = p.format == Format::kInt4;
    // Of 32 slots, lane t's eight places are its quad of the first 16 and that of the others.
    const int32_t half = quad / 8 * 8 + quad % 4 * 2 + quad / 4 % 2;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const float (&v)[kQuad][kChunk] = x[i];
      if (is_half) {
        reinterpret_cast<uint16_t*>(to)[half] =
            static_cast<uint16_t>(nibble_half(v[0][j], v[1][j], v[2][j], v[3][j]));
      } else {
        reinterpret_cast<uint32_t*>(to)[quad] = word_of(v[0][j], v[1][j], v[2][j], v[3][j]);
      }
      to += args.shared.column_bytes;
    }
  }

  PERMATTN_DEVICE void store_staged() const {
    const int32_t chunks = args.shared.column_bytes / 16;  // of a column; four bytes stay behind
    const int32_t per_group = p.dim * chunks;
    for (auto at = static_cast<int32_t>(threadIdx.x); at < args.tiling.groups * per_group;
         at += args.tiling.threads) {
      const int32_t group = at / per_group, inside = at % per_group;
      if (first_group + group >= args.tiling.num_groups) return;
      const char* from =
          staged + (group * reader.lanes * kChunk + inside / chunks) * args.shared.column_bytes;
      Words words;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words.x[j] = reinterpret_cast<const uint32_t*>(from)[inside % chunks * 4 + j];
      }
      char* to = static_cast<char*>(p.rows) + head * p.head_stride;
      reinterpret_cast<Words*>(to)[static_cast<int64_t>(first_group) * per_group + at] = words;
    }
  }

  PERMATTN_DEVICE void quantise() {
    find_maxima();
    __syncthreads();
    find_scales();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
#pragma unroll
      for (int s = 0; s < kQuad; ++s) {
        scale_row(row_of(i, s), x[i][s]);
        if (p.layout == Layout::kRows) store_bytes(row_of(i, s), x[i][s]);
        if (p.layout == Layout::kNibbleRows) store_nibbles(row_of(i, s), x[i][s]);
      }
      if (p.layout == Layout::kFragments) stage_quad(i);
    }
    if (p.layout != Layout::kFragments) return;
    __syncthreads();
    store_staged();
  }
};

template <Dtype kDtype, int kQuads, bool kTransformed>
PERMATTN_DEVICE void prepare(const PrepareArgs& args, char* shared) {
  using TileOf = Tile<kDtype, kQuads>;
  using Reader = typename TileOf::Reader;
  const PrepareParams& p = args.p;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto heads = static_cast<uint32_t>(p.out_heads);
  const auto tiles = static_cast<uint32_t>(args.tiling.tiles);
  // Heads of one token often lie side by side.
  const uint32_t h = blockIdx.x % heads, tile = blockIdx.x / heads % tiles;
  const uint32_t b = blockIdx.x / heads / tiles;
  char* spare = shared + args.shared.spare_offset;
  const Reader reader{p,
                      static_cast<int32_t>(b),
                      static_cast<int32_t>(h / (heads / static_cast<uint32_t>(p.heads))),
                      args.tiling.lanes,
                      thread % args.tiling.lanes,
                      args.whole_x,
                      args.whole_columns,
                      args.whole_angles,
                      reinterpret_cast<float*>(spare) + thread / 32 * (32 * kChunk)};
  TileOf made{args,
              p,
              reader,
              static_cast<int32_t>(b * heads + h),
              static_cast<int32_t>(tile) * args.tiling.rows(),
              static_cast<int32_t>(tile) * args.tiling.groups,
              thread / args.tiling.lanes,
              reinterpret_cast<uint32_t*>(shared),
              spare,
              {}};
  const int32_t* token_of_slot =
      p.token_of_slot.data == nullptr ? nullptr : p.token_of_slot.row(b, h);
  int32_t token[kQuads][kQuad];
  typename Reader::Chunk chunk[kQuads][kQuad];
  made.load(token_of_slot, token, chunk);
  if (p.format != Format::kNone) {
    for (int32_t at = thread; at < args.tiling.groups * args.shared.high_stride;
         at += args.tiling.threads) {
      made.high[at] = 0;
    }
    __syncthreads();
  }
  // What is only moved keeps its bits, NaN's too.
  const bool is_moved =
      !kTransformed && p.format == Format::kNone && p.mean == nullptr && p.factor == nullptr;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
#pragma unroll
    for (int s = 0; s < kQuad; ++s) {
      if (!is_moved) {
        made.template make_row<kTransformed>(token[i][s], chunk[i][s], made.x[i][s]);
        if (p.format != Format::kNone) continue;
        Type<kDtype>::pack(made.x[i][s], chunk[i][s]);
      }
      made.store_chunk(made.row_of(i, s), chunk[i][s]);
    }
  }
  if (p.format != Format::kNone) made.quantise();
}

}  // namespace permattn::permute
