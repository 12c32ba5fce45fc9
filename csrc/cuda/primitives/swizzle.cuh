// How tiles lie in shared memory: panels of 128, 64 or 32 bytes, whose chunks of 16 bytes are
// permuted by row as TMA and wgmma permute them. Eight rows of one column of chunks then lie in
// eight different groups of banks.
#pragma once
#include "../../common/host_device.h"

namespace permattn::ptx {

template <int kRows_, int kRowBytes_>
struct PanelLayout {
  static constexpr int kRows = kRows_, kRowBytes = kRowBytes_;
  static constexpr int kPanelBytes = kRowBytes % 128 == 0 ? 128 : kRowBytes % 64 == 0 ? 64 : 32;
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kRowBytes % 32 == 0 && kRows % 8 == 0);

  // Where a byte of a row lies.
  PERMATTN_HD static constexpr int offset(int row, int byte) {
    constexpr int kRowsPerLine = 128 / kPanelBytes;
    constexpr int kChunks = kPanelBytes / 16;
    const int chunk = byte % kPanelBytes / 16;
    const int swizzled = chunk ^ (row / kRowsPerLine % kChunks);
    return byte / kPanelBytes * (kRows * kPanelBytes) + row * kPanelBytes + swizzled * 16 +
           byte % 16;
  }
};

}  // namespace permattn::ptx
