// Blocks of tokens by their means: pooled, multiplied with each other, the strongest of every row.
#pragma once
#include "../permute/row_reader.cuh"
#include "lists.cuh"

namespace permattn::index {

using permute::add_to;
using permute::kChunk;

struct PoolArgs {
  PrepareParams source;  // x alone
  IntView token_of_slot;
  int64_t slots, block, blocks;
  int32_t lanes;
  bool whole_x;
  float* means;
};

// What every thread found, and how many rows.
constexpr int32_t kPoolShared = kThreads * (kChunk + 1) * 4;

// The rows of one block of slots, a block of threads each.
template <Dtype kDtype>
PERMATTN_DEVICE void pool(const PoolArgs& args, char* shared) {
  using Reader = permute::RowLoader<kDtype>;
  const PrepareParams& p = args.source;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto blocks = static_cast<uint32_t>(args.blocks), heads = static_cast<uint32_t>(p.heads);
  const uint32_t block = blockIdx.x % blocks, h = blockIdx.x / blocks % heads;
  const uint32_t b = blockIdx.x / blocks / heads;
  const Reader reader{p,          static_cast<int32_t>(b), static_cast<int32_t>(h),
                      args.lanes, thread % args.lanes,     args.whole_x};
  const int32_t* token_of_slot =
      args.token_of_slot.data == nullptr ? nullptr : args.token_of_slot.row(b, h);
  const int32_t units = kThreads / args.lanes;
  float total[kChunk] = {};
  int32_t rows = 0;
  for (int64_t at = thread / args.lanes; at < args.block; at += units) {
    const int64_t slot = block * args.block + at;
    if (slot >= args.slots) break;
    const auto token = token_of_slot == nullptr ? static_cast<int32_t>(slot) : token_of_slot[slot];
    if (token < 0 || token >= p.tokens) continue;
    typename Reader::Chunk chunk;
    float x[kChunk];
    reader.load(token, chunk);
    permute::Type<kDtype>::unpack(chunk, x);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) total[i] += x[i];
    ++rows;
  }
  auto* sums = reinterpret_cast<float*>(shared);  // [units][columns]
  auto* counts = reinterpret_cast<int32_t*>(sums + kThreads * kChunk);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sums[thread * kChunk + i] = total[i];
  if (reader.lane == 0) counts[thread / args.lanes] = rows;
  __syncthreads();
  float* to = args.means + ((static_cast<int64_t>(b) * heads + h) * blocks + block) * p.dim;
  for (int32_t d = thread; d < p.dim; d += kThreads) {
    float all = 0.0F;
    int32_t count = 0;
    for (int32_t unit = 0; unit < units; ++unit) {
      all += sums[unit * args.lanes * kChunk + d];
      count += counts[unit];
    }
    to[d] = permute::quotient(all, static_cast<float>(count < 1 ? 1 : count));
  }
}

constexpr int32_t kScoreTile = 64, kScoreDepth = 16;
// One word more a row: lanes read columns of both tiles.
constexpr int32_t kScoreStride = kScoreTile + 1;
constexpr int32_t kScoreShared = 2 * kScoreDepth * kScoreStride * 4;

// kScoreDepth columns of kScoreTile rows, turned: [column][row]; zeros where there are none.
PERMATTN_DEVICE void load_turned(const float* from, int64_t rows, int32_t dim, int32_t first_column,
                                 float* to) {
  for (auto i = static_cast<int32_t>(threadIdx.x); i < kScoreTile * kScoreDepth; i += kThreads) {
    const int32_t row = i / kScoreDepth, column = i % kScoreDepth;
    const bool is_there = row < rows && first_column + column < dim;
    to[column * kScoreStride + row] =
        is_there ? from[static_cast<int64_t>(row) * dim + first_column + column] : 0.0F;
  }
}

// A tile of scores: 16 a thread.
PERMATTN_DEVICE void score(const cuda::ScoreParams& p, char* shared) {
  constexpr int kOwn = 4, kApart = kScoreTile / kOwn;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto row_tiles = static_cast<uint32_t>((p.rows + kScoreTile - 1) / kScoreTile);
  const auto column_tiles = static_cast<uint32_t>((p.columns + kScoreTile - 1) / kScoreTile);
  const uint32_t head = blockIdx.x / column_tiles / row_tiles;
  const auto q_heads = static_cast<uint32_t>(p.q_heads);
  const uint32_t per_key = q_heads / static_cast<uint32_t>(p.k_heads);
  const int64_t row = static_cast<int64_t>(blockIdx.x / column_tiles % row_tiles) * kScoreTile;
  const int64_t column = static_cast<int64_t>(blockIdx.x % column_tiles) * kScoreTile;
  const uint32_t b = head / q_heads, k_head = head % q_heads / per_key;
  const float* q = p.q + (head * p.rows + row) * p.dim;
  const float* k = p.k + ((b * p.k_heads + k_head) * p.columns + column) * p.dim;
  auto* q_tile = reinterpret_cast<float*>(shared);
  float* k_tile = q_tile + kScoreDepth * kScoreStride;
  const int32_t own_row = thread / kApart, own_column = thread % kApart;
  float found[kOwn][kOwn] = {};
  for (int32_t first = 0; first < p.dim; first += kScoreDepth) {
    load_turned(q, p.rows - row, p.dim, first, q_tile);
    load_turned(k, p.columns - column, p.dim, first, k_tile);
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kScoreDepth; ++d) {
      float a[kOwn], c[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        a[i] = q_tile[d * kScoreStride + own_row + i * kApart];
        c[i] = k_tile[d * kScoreStride + own_column + i * kApart];
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) found[i][j] += a[i] * c[j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int64_t r = row + own_row + i * kApart, c = column + own_column + j * kApart;
      if (r < p.rows && c < p.columns) {
        p.scores[(head * p.rows + r) * p.columns + c] = found[i][j] * p.scale;
      }
    }
  }
}

constexpr int32_t kByteValues = 256;
constexpr int32_t kStrongestShared = kWarps * kByteValues * 4;

// Ordered like the score; 0 for what is never chosen.
PERMATTN_DEVICE uint32_t strength(float score) {
  const uint32_t bits = ptx::bits_of(score + 0.0F);  // -0 is 0
  const uint32_t ordered = (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
  constexpr uint32_t kMinusInfinity = 0x007fffffU;
  return score == score && ordered > kMinusInfinity ? ordered : 0;
}

// A row of scores, as a warp looks through it.
struct ScoreRow {
  const float* scores;
  int64_t stop;
  int32_t lane;

  PERMATTN_DEVICE uint32_t at(int64_t column) const {
    return column < stop ? strength(scores[column]) : 0;
  }
};

// A value of a byte: that of the left-th largest number, and how many from the largest of that
// value on are still to be passed. None: -1.
struct ByteRank {
  int32_t value, left;
};
PERMATTN_DEVICE ByteRank find_byte(const uint32_t* counts, int32_t left, int32_t lane) {
  constexpr int32_t kOwn = kByteValues / 32;
  int32_t all = 0;
#pragma unroll
  for (int32_t i = 0; i < kOwn; ++i) all += static_cast<int32_t>(counts[lane * kOwn + i]);
  const int32_t up_to = sum_up_to_lane(all, lane);
  const int32_t above = shuffle_from(up_to, 31) - up_to;
  const bool is_here = above < left && left <= above + all;
  const uint32_t here = ptx::ballot(is_here);
  if (here == 0) return {-1, left};
  ByteRank found{-1, left - above};
  if (is_here) {
    found.value = lane * kOwn + kOwn - 1;
    for (int32_t own; (own = static_cast<int32_t>(counts[found.value])) < found.left;) {
      found.left -= own;
      --found.value;
    }
  }
  const int32_t from = count_bits((here & (0U - here)) - 1U);
  return {shuffle_from(found.value, from), shuffle_from(found.left, from)};
}

// The strength of the count-th score, and how many of that strength are among the first `count`.
// Fewer than `count` there are: 0, and all of them. Looks at a byte after the other, highest first.
struct Threshold {
  uint32_t strength;
  int32_t equals;
};
PERMATTN_DEVICE Threshold find_threshold(const ScoreRow& row, int32_t count, uint32_t* counts) {
  Threshold found{0, count};
  for (int32_t shift = 24; shift >= 0; shift -= 8) {
    for (int32_t i = row.lane; i < kByteValues; i += 32) counts[i] = 0;
    __syncwarp();
    for (int64_t column = row.lane; column < row.stop; column += 32) {
      const uint32_t own = row.at(column);
      const bool is_under_way = shift == 24 || own >> (shift + 8) == found.strength >> (shift + 8);
      if (own != 0 && is_under_way) add_to(counts + (own >> shift) % kByteValues, 1);
    }
    __syncwarp();
    const ByteRank rank = find_byte(counts, found.equals, row.lane);
    __syncwarp();
    if (rank.value < 0) return {0, 0};
    found.strength |= static_cast<uint32_t>(rank.value) << shift;
    found.equals = rank.left;
  }
  return found;
}

// The strongest columns of a row, ascending.
PERMATTN_DEVICE void choose_strongest(const cuda::StrongestParams& p, char* shared) {
  const WarpRow at = warp_row(p.heads, p.rows);
  if (!at.is_there) return;
  const int64_t stop = p.stop == nullptr ? p.columns : p.stop[at.head * p.stop_stride + at.row];
  const ScoreRow row{p.scores + at.at * p.columns, stop < p.columns ? stop : p.columns, at.lane};
  int32_t count = p.budget == nullptr
                      ? p.count
                      : p.budget[static_cast<uint32_t>(at.head) % static_cast<uint32_t>(p.q_heads)];
  count = count < p.count ? count : p.count;
  int32_t* to = p.chosen + at.at * p.count;
  int32_t next = 0;
  if (count > 0) {
    auto* counts = reinterpret_cast<uint32_t*>(shared) + threadIdx.x / 32 * kByteValues;
    const Threshold threshold = find_threshold(row, count, counts);
    int32_t equals_left = threshold.equals;
    for (int64_t first = 0; first < row.stop; first += 32) {
      const uint32_t own = row.at(first + at.lane);
      const uint32_t before = (1U << at.lane) - 1U;
      const bool is_equal = own != 0 && own == threshold.strength;
      const uint32_t equal = ptx::ballot(is_equal);
      const bool is_chosen =
          is_equal ? count_bits(equal & before) < equals_left : own > threshold.strength;
      const uint32_t chosen = ptx::ballot(is_chosen);
      if (is_chosen) to[next + count_bits(chosen & before)] = static_cast<int32_t>(first) + at.lane;
      next += count_bits(chosen);
      equals_left -= count_bits(equal);
    }
  }
  for (int32_t i = next + at.lane; i < p.count; i += 32) to[i] = -1;
}

}  // namespace permattn::index
