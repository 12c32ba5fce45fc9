// Rows between global memory and panels in shared memory.
#pragma once
#include "../primitives/memory.cuh"
#include "../primitives/swizzle.cuh"
#include "lane_stager.cuh"

namespace permattn::device {

constexpr int kChunkBytes = 16;  // what one cp.async copies

// Where a row begins, and whether it is copied; zeros take the place of one that is not.
struct RowSource {
  const char* from;
  bool is_there;
};

// Copies Layout's rows asynchronously. source(row): a RowSource, whose address is sound either way.
// Bytes past row_bytes are zeros. Threads stand on rows of one panel after the other, so that all
// places but the first follow from constants.
template <class Layout, int kThreads, class Source>
PERMATTN_DEVICE void copy_rows(char* tile, int32_t thread, int32_t row_bytes,
                               const Source& source) {
  constexpr int kPanelBytes = Layout::kPanelBytes;
  constexpr int kChunks = kPanelBytes / kChunkBytes;
  constexpr int kAtOnce = kThreads / kChunks;  // rows
  static_assert(kAtOnce % 8 == 0, "rows of one thread must be swizzled alike");
  const int first_row = static_cast<int>(static_cast<uint32_t>(thread) / kChunks);
  const int byte = static_cast<int>(static_cast<uint32_t>(thread) % kChunks) * kChunkBytes;
  char* to = tile + Layout::offset(first_row, byte);
#pragma unroll
  for (int row = 0; row < Layout::kRows; row += kAtOnce) {
    if (Layout::kRows % kAtOnce != 0 && row + first_row >= Layout::kRows) break;
    const RowSource from = source(row + first_row);
#pragma unroll
    for (int at = 0; at < Layout::kRowBytes; at += kPanelBytes) {
      const int left = clamp(row_bytes - at - byte, 0, kChunkBytes);
      ptx::cp_async_16(to + at * Layout::kRows + row * kPanelBytes, from.from + at + byte,
                       from.is_there ? left : 0);
    }
  }
}

// Numbers of a word with their signs turned.
template <Format kFormat>
PERMATTN_DEVICE uint32_t negated(uint32_t word) {
  if constexpr (kFormat == Format::kNone) {
    return word ^ 0x80008000U;
  } else {
    // Two's complement of every number at once: what is carried stays below the sign bits.
    constexpr uint32_t kSigns = kFormat == Format::kInt8 ? 0x80808080U : 0x88888888U;
    constexpr uint32_t kOnes = kFormat == Format::kInt8 ? 0x01010101U : 0x11111111U;
    return ((~word & ~kSigns) + kOnes) ^ (~word & kSigns);
  }
}

// The largest of a row's scores is looked for before they are scaled, so the scale must be
// positive: where it is not, -Q takes the place of Q.
template <Format kFormat, int kThreads, int kBytes>
PERMATTN_DEVICE void negate_queries(int32_t thread, char* tile) {
  auto* words = reinterpret_cast<uint32_t*>(tile);
  for (int i = thread; i < kBytes / 4; i += kThreads) words[i] = negated<kFormat>(words[i]);
}

// Rows of keys or values that lanes of a tile stand for.
template <class Layout, int kThreads, int kBlockN>
PERMATTN_DEVICE void copy_lanes(char* tile, int32_t thread, const LaneTile<kBlockN>& lanes,
                                bool in_slots, const char* base, int64_t stride,
                                int32_t row_bytes) {
  const int32_t* rows = in_slots ? lanes.slot : lanes.token;
  copy_rows<Layout, kThreads>(tile, thread, row_bytes, [&](int row) -> RowSource {
    const bool is_there = lanes.token[row] >= 0;
    return {base + (is_there ? rows[row] : 0) * stride, is_there};
  });
}

}  // namespace permattn::device
