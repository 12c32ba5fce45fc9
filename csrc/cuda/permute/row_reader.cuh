// Rows as a warp holds them: `lanes` threads a row, kChunk columns each; gathered, then normed and
// rotated in float32 step by step as core.prologue.RowTransform says.
#pragma once
#include "exact.cuh"
#include "tiling.h"
#include "warp.cuh"

namespace permattn::permute {

using cuda::kChunk;
using cuda::WholeLoads;

// Up to kCount numbers of a float table; 0 past `count`.
template <int kCount>
PERMATTN_DEVICE void load_floats(const float* from, int32_t count, bool is_whole,
                                 float (&to)[kCount]) {
  if (is_whole && count >= kCount) {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const auto words = reinterpret_cast<const Words*>(from)[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) to[4 * i + j] = ptx::float_from_bits(words.x[j]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) to[j] = j < count ? from[j] : 0.0F;
}

// Sum over the threads of a row; the same in all of them.
PERMATTN_DEVICE float row_sum(float x, int32_t lanes) {
  for (int32_t mask = lanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// A number for every column of a thread, or none. Held in registers, or read again for every row.
template <bool kIsHeld>
struct ColumnTable {
  const float* from;  // the thread's first column; or null
  int32_t left;       // columns from there on
  bool is_whole;
  float held[kIsHeld ? kChunk : 1];

  PERMATTN_DEVICE ColumnTable(const float* table, int32_t first, int32_t dim, bool whole)
      : from(table == nullptr ? nullptr : table + first), left(dim - first), is_whole(whole) {
    if constexpr (kIsHeld) {
      if (from != nullptr) load_floats(from, left, is_whole, held);
    }
  }

  PERMATTN_DEVICE bool is_there() const { return from != nullptr; }
  PERMATTN_DEVICE void get(float (&to)[kChunk]) const {
    if constexpr (kIsHeld) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) to[i] = held[i];
    } else {
      load_floats(from, left, is_whole, to);
    }
  }
};

// One thread's part of the rows of a head of x.
template <Dtype kDtype>
struct RowLoader {
  using Storage = typename Type<kDtype>::Storage;
  using Chunk = typename Type<kDtype>::Chunk;

  const PrepareParams& p;
  int32_t b, h;         // h is a head of x
  int32_t lanes, lane;  // of a row
  bool whole_x;

  PERMATTN_DEVICE int32_t first_column() const { return lane * kChunk; }
  PERMATTN_DEVICE int32_t columns_left() const { return p.dim - first_column(); }

  // Zeros for a token that is none.
  PERMATTN_DEVICE void load(int32_t token, Chunk& chunk) const {
#pragma unroll
    for (auto& words : chunk) words = {};
    const int32_t left = columns_left();
    if (token < 0 || left <= 0) return;
    const Storage* from = static_cast<const Storage*>(p.x.data) + b * p.x.stride_b +
                          h * p.x.stride_h + token * p.x.stride_s + first_column();
    if (whole_x) {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(Chunk) / sizeof(Words)); ++i) {
        chunk[i] = reinterpret_cast<const Words*>(from)[i];
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= left) continue;
      if constexpr (sizeof(Storage) == 2) {
        chunk[0].x[i / 2] |= static_cast<uint32_t>(from[i]) << (i % 2 * 16);
      } else {
        chunk[i / 4].x[i % 4] = ptx::bits_of(from[i]);
      }
    }
  }
};

// What is done to rows once they are there.
template <bool kHoldsTables>
struct RowTransform {
  using Table = ColumnTable<kHoldsTables>;
  static constexpr int kPairs = kChunk / 2;

  const PrepareParams& p;
  int32_t b;
  int32_t lanes, lane;  // of a row
  bool whole_angles;
  float* exchange;  // shared memory of the warp, [kChunk][32]; only for halves
  Table weight;
  ColumnTable<false> bias;  // rarer

  // `is_used`: false reads no tables.
  template <class Loader>
  PERMATTN_DEVICE RowTransform(const Loader& rows, const WholeLoads& whole, bool is_used,
                               float* spare)
      : p(rows.p),
        b(rows.b),
        lanes(rows.lanes),
        lane(rows.lane),
        whole_angles(whole.angles),
        exchange(spare),
        weight(of_head(is_used ? p.transform.weight : nullptr, rows), first_column(), p.dim,
               whole.columns),
        bias(of_head(is_used ? p.transform.bias : nullptr, rows), first_column(), p.dim,
             whole.columns) {}

  // Of [D], or of [H * D] for a norm across heads.
  template <class Loader>
  static PERMATTN_DEVICE const float* of_head(const float* table, const Loader& rows) {
    const bool has_heads = table != nullptr && rows.p.transform.across_heads;
    return has_heads ? table + static_cast<int64_t>(rows.h) * rows.p.dim : table;
  }

  PERMATTN_DEVICE int32_t first_column() const { return lane * kChunk; }
  PERMATTN_DEVICE int32_t columns_left() const { return p.dim - first_column(); }

  PERMATTN_DEVICE void normalise(int32_t token, float (&x)[kChunk]) const {
    const Transform& t = p.transform;
    float mean = 0.0F, inverse = 0.0F;
    if (t.across_heads) {
      if (token >= 0) {
        const float* stats = p.token_stats + 2 * (b * p.tokens + token);
        mean = stats[0];
        inverse = stats[1];
      }
    }
    const auto count = static_cast<float>(p.dim);
    if (t.norm == Transform::Norm::kLayer) {
      if (!t.across_heads) {
        float all = 0.0F;
#pragma unroll
        for (float each : x) all += each;
        mean = quotient(row_sum(all, lanes), count);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = i < columns_left() ? difference(x[i], mean) : 0.0F;
    }
    if (!t.across_heads) {
      float square = 0.0F;
#pragma unroll
      for (float each : x) square += each * each;
      const float mean_square = quotient(row_sum(square, lanes), count);
      inverse = quotient(1.0F, square_root(sum(mean_square, t.eps)));
    }
#pragma unroll
    for (float& each : x) each = product(each, inverse);
    float by_column[kChunk];
    if (weight.is_there()) {
      weight.get(by_column);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = product(x[i], by_column[i]);
    }
    if (bias.is_there()) {
      bias.get(by_column);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = sum(x[i], by_column[i]);
    }
  }

  // Columns (2i, 2i + 1) turn by angle i.
  PERMATTN_DEVICE void rotate_pairs(const float* cos, const float* sin, float (&x)[kChunk]) const {
    const int32_t first = first_column() / 2;
    const auto left = static_cast<int32_t>(p.transform.rope_width) - first;
    if (left <= 0) return;
    float c[kPairs], s[kPairs];
    load_floats(cos + first, left, whole_angles, c);
    load_floats(sin + first, left, whole_angles, s);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (i >= left) continue;
      const float even = x[2 * i], odd = x[2 * i + 1];
      x[2 * i] = difference(product(even, c[i]), product(odd, s[i]));
      x[2 * i + 1] = sum(product(even, s[i]), product(odd, c[i]));
    }
  }

  // Columns (i, i + width) turn by angle i; `partner` holds the other column's number.
  PERMATTN_DEVICE void rotate_halves(const float* cos, const float* sin,
                                     const float (&partner)[kChunk], float (&x)[kChunk]) const {
    const auto width = static_cast<int32_t>(p.transform.rope_width);
    const int32_t column = first_column();
    // A chunk that lies in one half has its angles in a row.
    if (whole_angles && column < 2 * width) {
      const int32_t angle = column < width ? column : column - width;
      float c[kChunk], s[kChunk];
      load_floats(cos + angle, kChunk, true, c);
      load_floats(sin + angle, kChunk, true, s);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = turned(x[i], partner[i], c[i], s[i], column < width);
      return;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (column + i >= 2 * width) continue;
      const bool is_first = column + i < width;
      const int32_t angle = is_first ? column + i : column + i - width;
      x[i] = turned(x[i], partner[i], cos[angle], sin[angle], is_first);
    }
  }

  static PERMATTN_DEVICE float turned(float x, float partner, float cos, float sin, bool is_first) {
    return sum(product(x, cos), product(partner, is_first ? -sin : sin));
  }

  // Each chunk's numbers lie 32 words apart: lanes that read columns `width` on, whatever width is,
  // meet no conflict.
  PERMATTN_DEVICE void read_partners(const float (&x)[kChunk], float (&partner)[kChunk]) const {
    const auto width = static_cast<int32_t>(p.transform.rope_width);
    const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % 32;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) exchange[i * 32 + warp_lane] = x[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int32_t column = first_column() + i;
      const int32_t other = column < width ? column + width : column - width;
      const bool has_other = column < 2 * width;
      partner[i] =
          has_other ? exchange[other % kChunk * 32 + warp_lane - lane + other / kChunk] : 0.0F;
    }
  }

  // All lanes of a warp come here together.
  PERMATTN_DEVICE void apply(int32_t token, float (&x)[kChunk]) const {
    const Transform& t = p.transform;
    if (t.norm != Transform::Norm::kNone) normalise(token, x);
    if (t.cos == nullptr) return;
    const int64_t angle = token - t.rope_start;
    const bool turns = token >= 0 && angle >= 0 && angle < t.rope_rows;
    const float* cos = t.cos + angle * t.rope_width;
    const float* sin = t.sin + angle * t.rope_width;
    if (t.interleaved) {
      if (turns) rotate_pairs(cos, sin, x);
      return;
    }
    float partner[kChunk];
    read_partners(x, partner);
    if (turns) rotate_halves(cos, sin, partner, x);
  }
};

}  // namespace permattn::permute
