// Where a block's rows come from and go to, and how they are written in every layout.
#pragma once
#include "row_reader.cuh"

namespace permattn::permute {

using cuda::kQuad;
using cuda::PrepareArgs;

// A tile: whole groups of slots of one head of the result.
struct TilePlace {
  const PrepareArgs& args;
  const PrepareParams& p;
  int32_t head;        // of the result, over batches
  int32_t first_slot;  // of the tile
  int32_t first_group;
  int32_t unit, lane;  // of threads of a row, and of the thread in it

  PERMATTN_DEVICE int32_t lanes() const { return args.tiling.lanes; }
  PERMATTN_DEVICE int32_t first_column() const { return lane * kChunk; }
  PERMATTN_DEVICE int32_t columns_left() const { return p.dim - first_column(); }

  // The thread's i-th quad of the tile, and its rows.
  PERMATTN_DEVICE int32_t quad_of(int32_t i) const {
    return unit + i * (args.tiling.threads / lanes());
  }
  static PERMATTN_DEVICE int32_t row_of(int32_t quad, int s) {
    return quad / 4 * 16 + quad % 4 * 2 + s % 2 + s / 2 * 8;
  }
  PERMATTN_DEVICE bool is_row(int32_t row) const {
    return row < args.tiling.rows() && first_slot + row < p.padded_slots;
  }
  PERMATTN_DEVICE bool is_one_group() const { return args.tiling.groups == 1; }
  // A quotient costs as much as a few numbers do.
  PERMATTN_DEVICE int32_t group_of(int32_t row) const {
    return is_one_group() ? 0 : row / args.tiling.rows_per_group;
  }
};

struct RowWriter : TilePlace {
  char* staged;  // shared memory, a tile of kFragments

  PERMATTN_DEVICE RowWriter(const TilePlace& place, char* tile) : TilePlace(place), staged(tile) {}

  PERMATTN_DEVICE char* row_start(int32_t row, int32_t size) const {
    return static_cast<char*>(p.rows) + head * p.head_stride +
           (static_cast<int64_t>(first_slot + row) * p.row_stride + first_column()) * size;
  }

  // Rows in the caller's type.
  template <class Storage, class Chunk>
  PERMATTN_DEVICE void store_chunk(int32_t row, const Chunk& chunk) const {
    const int32_t left = columns_left();
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
    const int32_t left = columns_left();
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
    const int32_t left = columns_left();
    if (!is_row(row) || left <= 0) return;
    char* to = static_cast<char*>(p.rows) + head * p.head_stride +
               (static_cast<int64_t>(first_slot + row) * p.row_stride + first_column()) / 2;
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
  PERMATTN_DEVICE void stage_quad(int32_t quad_of_tile, const float (&v)[kQuad][kChunk]) const {
    const int32_t first = row_of(quad_of_tile, 0), group = group_of(first);
    if (first >= args.tiling.rows()) return;
    const int32_t quad = quad_of_tile - group * (args.tiling.rows_per_group / 4);
    char* to = staged + (group * lanes() * kChunk + first_column()) * args.shared.column_bytes;
    const bool is_half = p.format == Format::kInt4;
    // Of 32 slots, lane t's eight places are its quad of the first 16 and that of the others.
    const int32_t half = quad / 8 * 8 + quad % 4 * 2 + quad / 4 % 2;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
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
          staged + (group * lanes() * kChunk + inside / chunks) * args.shared.column_bytes;
      Words words;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words.x[j] = reinterpret_cast<const uint32_t*>(from)[inside % chunks * 4 + j];
      }
      char* to = static_cast<char*>(p.rows) + head * p.head_stride;
      reinterpret_cast<Words*>(to)[static_cast<int64_t>(first_group) * per_group + at] = words;
    }
  }
};

}  // namespace permattn::permute
