// Rows between global memory and panels in shared memory.
#pragma once
#include "../primitives/memory.cuh"
#include "../primitives/swizzle.cuh"
#include "lane_stager.cuh"

namespace permattn::device {

constexpr int kChunkBytes = 16;  // what one cp.async copies

// Copies Layout's rows asynchronously. address(row): where a row begins, null: the row is zeros.
// Bytes past row_bytes are zeros.
template <class Layout, int kThreads, class Address>
PERMATTN_DEVICE void copy_rows(char* tile, int32_t thread, int32_t row_bytes, const void* anywhere,
                               const Address& address) {
  constexpr int kChunks = Layout::kRowBytes / kChunkBytes;
  constexpr int kAll = Layout::kRows * kChunks;
#pragma unroll
  for (int first = 0; first < kAll; first += kThreads) {
    const int i = first + thread;
    if (kAll % kThreads != 0 && i >= kAll) break;
    const int row = i / kChunks;
    const int byte = i % kChunks * kChunkBytes;
    const char* from = address(row);
    const int left = from == nullptr ? 0 : clamp(row_bytes - byte, 0, kChunkBytes);
    ptx::cp_async_16(tile + Layout::offset(row, byte), left > 0 ? from + byte : anywhere, left);
  }
}

// Rows of keys or values that lanes of a tile stand for.
template <class Layout, int kThreads, int kBlockN>
PERMATTN_DEVICE void copy_lanes(char* tile, int32_t thread, const LaneTile<kBlockN>& lanes,
                                bool in_slots, const char* base, int64_t stride,
                                int32_t row_bytes) {
  const int32_t* rows = in_slots ? lanes.slot : lanes.token;
  copy_rows<Layout, kThreads>(tile, thread, row_bytes, base, [&](int row) -> const char* {
    return lanes.token[row] < 0 ? nullptr : base + rows[row] * stride;
  });
}

}  // namespace permattn::device
