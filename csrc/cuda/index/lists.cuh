// Rows of bits or bytes turned into lists: counted, summed up, then written. Nothing depends on the
// order in which blocks of threads run.
#pragma once
#include "../device/part_head.cuh"
#include "../permute/warp.cuh"
#include "index.h"

namespace permattn::index {

using permute::count_bits;
using permute::join_bits;
using permute::shuffle_from;
using permute::shuffle_up;

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;
constexpr int32_t kSumThreads = 1024;

// A warp's row of the rows of all heads; `is_there` is the same for all lanes.
struct WarpRow {
  int64_t at, head, row;
  int32_t lane;
  bool is_there;
};
PERMATTN_DEVICE WarpRow warp_row(int64_t heads, int64_t rows) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  // Fewer than 2^31 of them; 64-bit quotients are calls.
  const uint32_t at = blockIdx.x * kWarps + static_cast<uint32_t>(thread / 32);
  const auto each = static_cast<uint32_t>(rows);
  return {at, at / each, at % each, thread % 32, at < heads * rows};
}

// Sum over the lanes up to this one.
PERMATTN_DEVICE int32_t sum_up_to_lane(int32_t x, int32_t lane) {
#pragma unroll
  for (int32_t step = 1; step < 32; step *= 2) {
    const int32_t below = shuffle_up(x, step);
    x += lane >= step ? below : 0;
  }
  return x;
}

// Unused entries of a head, shared out to the warps of its rows.
PERMATTN_DEVICE void fill_tail(const cuda::Lists& lists, const WarpRow& at, int64_t rows,
                               int32_t value) {
  const int64_t used = lists.row_offsets[at.head * (rows + 1) + rows];
  for (int64_t i = used + at.row * 32 + at.lane; i < lists.capacity; i += rows * 32) {
    lists.indices[at.head * lists.capacity + i] = value;
  }
}

// Lengths of rows, where the scan finds them.
PERMATTN_DEVICE void count_mask(const cuda::CompactParams& p) {
  const WarpRow at = warp_row(p.heads, p.rows);
  if (!at.is_there) return;
  const uint8_t* mask = p.mask + at.at * p.columns;
  int32_t count = 0;
  for (int64_t first = 0; first < p.columns; first += 32) {
    const int64_t column = first + at.lane;
    count += count_bits(ptx::ballot(column < p.columns && mask[column] != 0));
  }
  if (at.lane != 0) return;
  p.lists.row_offsets[at.head * (p.rows + 1) + at.row + 1] = count;
  p.lists.num_full[at.at] = p.all_full ? count : 0;
}

PERMATTN_DEVICE void list_mask(const cuda::CompactParams& p) {
  const WarpRow at = warp_row(p.heads, p.rows);
  if (!at.is_there) return;
  const uint8_t* mask = p.mask + at.at * p.columns;
  int64_t next = p.lists.row_offsets[at.head * (p.rows + 1) + at.row];
  for (int64_t first = 0; first < p.columns; first += 32) {
    const int64_t column = first + at.lane;
    const bool is_listed = column < p.columns && mask[column] != 0;
    const uint32_t listed = ptx::ballot(is_listed);
    const int64_t place = next + count_bits(listed & ((1U << at.lane) - 1U));
    if (is_listed && place < p.lists.capacity) {
      p.lists.indices[at.head * p.lists.capacity + place] = static_cast<int32_t>(column);
    }
    next += count_bits(listed);
  }
  fill_tail(p.lists, at, p.rows, 0);
}

// Lengths of a head's rows become offsets; shared memory holds kSumThreads / 32 numbers.
PERMATTN_DEVICE void sum_lengths(const cuda::Lists& lists, int64_t rows, int32_t* of_warp) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t lane = thread % 32, warp = thread / 32;
  int32_t* offsets = lists.row_offsets + blockIdx.x * (rows + 1);
  if (thread == 0) offsets[0] = 0;
  int32_t before = 0;
  for (int64_t first = 0; first < rows; first += kSumThreads) {
    const int64_t row = first + thread;
    const int32_t own = sum_up_to_lane(row < rows ? offsets[row + 1] : 0, lane);
    if (lane == 31) of_warp[warp] = own;
    __syncthreads();
    const int32_t warps = sum_up_to_lane(of_warp[lane], lane);
    const int32_t below = shuffle_from(warps, warp - 1);
    if (row < rows) offsets[row + 1] = before + own + (warp == 0 ? 0 : below);
    before += shuffle_from(warps, 31);
    __syncthreads();
  }
}

// Pairs of blocks as bits: [head][column][2][words] of rows, full ones and partial ones.
PERMATTN_HD inline int64_t words_of(int64_t rows) { return (rows + 31) / 32; }

PERMATTN_DEVICE void clear_bits(const cuda::TransposeParams& p) {
  const int64_t count = p.heads * p.columns * 2 * words_of(p.rows);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < count) p.scratch[at] = 0;
}

PERMATTN_DEVICE void set_pairs(const cuda::TransposeParams& p) {
  const WarpRow at = warp_row(p.heads, p.rows);
  if (!at.is_there) return;
  const int32_t* offsets = p.row_offsets + at.head * (p.rows + 1) + at.row;
  const int64_t words = words_of(p.rows);
  // Nothing outside is read, whatever the offsets of an unchecked index are.
  const auto capacity = static_cast<int32_t>(p.lists.capacity);
  const int32_t begin = device::clamp(offsets[0], 0, capacity);
  const int32_t end = device::clamp(offsets[1], begin, capacity);
  for (int32_t entry = begin + at.lane; entry < end; entry += 32) {
    const int32_t column = p.indices[at.head * p.lists.capacity + entry];
    if (column < 0 || column >= p.columns) continue;
    const int64_t is_partial = entry - begin < p.num_full[at.at] ? 0 : 1;
    const int64_t first = ((at.head * p.columns + column) * 2 + is_partial) * words;
    join_bits(p.scratch + first + at.row / 32, 1U << (at.row % 32));
  }
}

PERMATTN_DEVICE void count_pairs(const cuda::TransposeParams& p) {
  const WarpRow at = warp_row(p.heads, p.columns);
  if (!at.is_there) return;
  const int64_t words = words_of(p.rows);
  const uint32_t* bits = p.scratch + at.at * 2 * words;
  int32_t full = 0, all = 0;
  for (int64_t word = at.lane; word < words; word += 32) {
    full += count_bits(bits[word]);
    all += count_bits(bits[word]) + count_bits(bits[words + word]);
  }
  full = sum_up_to_lane(full, at.lane);
  all = sum_up_to_lane(all, at.lane);
  if (at.lane != 31) return;
  p.lists.num_full[at.at] = full;
  p.lists.row_offsets[at.head * (p.columns + 1) + at.row + 1] = all;
}

PERMATTN_DEVICE void list_pairs(const cuda::TransposeParams& p) {
  const WarpRow at = warp_row(p.heads, p.columns);
  if (!at.is_there) return;
  const int64_t words = 2 * words_of(p.rows);
  const uint32_t* bits = p.scratch + at.at * words;
  int32_t* to = p.lists.indices + at.head * p.lists.capacity;
  int32_t next = p.lists.row_offsets[at.head * (p.columns + 1) + at.row];
  for (int64_t first = 0; first < words; first += 32) {
    const int64_t word = first + at.lane;
    const uint32_t own = word < words ? bits[word] : 0;
    const int32_t up_to = sum_up_to_lane(count_bits(own), at.lane);
    int32_t place = next + up_to - count_bits(own);
    const int64_t of_half = word < words / 2 ? word : word - words / 2;
    const auto row = static_cast<int32_t>(of_half * 32);
    // Rows of an unchecked index may share entries: more pairs than there is room for.
    for (uint32_t left = own; left != 0 && place < p.lists.capacity; left &= left - 1U) {
      to[place++] = row + count_bits((left & (0U - left)) - 1U);
    }
    next += shuffle_from(up_to, 31);
  }
  fill_tail(p.lists, at, p.columns, static_cast<int32_t>(p.rows) - 1);
}

}  // namespace permattn::index
