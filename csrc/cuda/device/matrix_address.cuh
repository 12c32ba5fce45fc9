// Where ldmatrix finds fragments in a tile of panels.
#pragma once
#include "../primitives/swizzle.cuh"
#include "rows.cuh"

namespace permattn::device {

// Addresses of ldmatrix.x4 inside a tile of panels, as offsets from the block's shared memory. `a`:
// four 8 x 8 matrices of 16 rows by 32 bytes, rows first: fragments of A, and of B where B is
// transposed. `b`: bytes first, fragments of B for two columns of tiles. Steps along the row flip
// bits, as the swizzle does. The tile's offset is in before they do: sums of the two would be the
// same in every turn of the loop, and take up registers all along.
template <class Layout>
struct MatrixAddress {
  uint32_t start;

  PERMATTN_DEVICE static MatrixAddress of_a(uint32_t tile, int32_t lane) {
    return {tile + static_cast<uint32_t>(Layout::offset(lane % 16, lane / 16 * kChunkBytes))};
  }
  PERMATTN_DEVICE static MatrixAddress of_b(uint32_t tile, int32_t lane) {
    return {tile + static_cast<uint32_t>(
                       Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2 * kChunkBytes))};
  }
  // `row`: a multiple of 16; `step`: of 32 bytes.
  PERMATTN_DEVICE uint32_t at(int row, int step) const {
    constexpr int kSteps = Layout::kPanelBytes / 32;
    return (start ^ (step % kSteps * 32)) + step / kSteps * (Layout::kRows * Layout::kPanelBytes) +
           row * Layout::kPanelBytes;
  }
};

}  // namespace permattn::device
