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
