// One kernel: what it multiplies, its tile, and how its shared memory is laid out.
#pragma once
#include "../device/rows.cuh"
#include "products.cuh"

namespace permattn::sm80 {

using cuda::AttentionArgs;
using cuda::PartArgs;
using device::kChunkBytes;
using device::LaneTile;
using device::PartHead;

// kDtype: of q, k, v and out; kFloat32 where only `out` has it, which is then looked up.
template <Dtype kDtype_, Format kQk_, Format kPv_, int kDim_, int kRows>
struct Traits {
  static constexpr Dtype kDtype = kDtype_;
  static constexpr Format kQk = kQk_, kPv = kPv_;
  static constexpr int kDim = kDim_;
  static constexpr TileShape kShape = tile_shape(kQk, kPv, kDim, kRows);
  static constexpr int kBlockM = kShape.block_m, kBlockN = kShape.block_n;
  static constexpr int kStages = kShape.stages;
  static constexpr int kThreads = 32 * kShape.warps;
  static constexpr int kWarpRows = kBlockM / kShape.warps;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kColumnTiles = kDim / 8;
  static constexpr int kKeyTiles = kBlockN / 8;
  static constexpr bool kQuantisedQk = kQk != Format::kNone;
  static constexpr bool kQuantisedPv = kPv != Format::kNone;
  static constexpr bool kQInRegisters = kShape.q_in_registers;
  static_assert(kBlockM % (16 * kShape.warps) == 0 && kBlockN % 32 == 0 && kBlockN <= kThreads);
  static_assert(kStages >= 2);

  using Scores = ScoreProduct<kQk, kDtype>;
  using Score = typename Scores::Sum;
  using Values = ScoreProduct<Format::kNone, kDtype>;  // where P V is not quantised

  // Steps of 32 bytes along the summed axis of either product.
  static constexpr int kQkBytes = row_bytes(kQk, kDim), kQkSteps = kQkBytes / 32;
  // Where Q is read again there are no registers for loads far ahead.
  static constexpr int kUnrolledSteps = kQInRegisters ? kQkSteps : kQuantisedQk ? 1 : 2;
  static constexpr int kPvSteps = kQuantisedPv ? row_bytes(kPv, kBlockN) / 32 : kBlockN / 16;

  using QLayout = ptx::PanelLayout<kBlockM, kQkBytes>;
  using KLayout = ptx::PanelLayout<kBlockN, kQkBytes>;
  // Small values lie with keys innermost, as their instructions want it.
  using VLayout = ptx::PanelLayout<kQuantisedPv ? kDim : kBlockN,
                                   kQuantisedPv ? row_bytes(kPv, kBlockN) : 2 * kDim>;
  using OutLayout = ptx::PanelLayout<kBlockM, 2 * kDim>;

  // Tile i of the keys has lanes i % kRing and buffers i % kStages. Lanes are written two tiles
  // before rows are asked for, and read until the tile is done.
  static constexpr int kRing = kStages <= 2 ? 4 : 8;
  static_assert(kRing >= kStages + 2);

  struct Bookkeeping {
    PartHead heads[cuda::kMaxParts];
    LaneTile<kBlockN> lanes[kRing];
    int32_t q_tokens[kBlockM];
    float q_factors[kQuantisedQk ? kBlockM : 1];  // from scores to base 2, before k's
    device::TokenSpan q_span;
  };

  static constexpr int kKTileBytes = kBlockN * kQkBytes;
  static constexpr int kVTileBytes = VLayout::kBytes;
  static constexpr int kVScaleBytes = kQuantisedPv ? 4 * kDim : 0;
  static constexpr int kStageBytes =
      (kKTileBytes + kVTileBytes + kVScaleBytes + 1023) / 1024 * 1024;
  static constexpr int kQBytes = kBlockM * kQkBytes;
  // Q passes through the last stage, which the first tiles do not need, where it is kept in
  // registers.
  static constexpr int kQOffset = (kQInRegisters ? kStages - 1 : kStages) * kStageBytes;
  static constexpr int kBookkeepingOffset =
      kQInRegisters ? kStages * kStageBytes : kQOffset + kQBytes;
  static constexpr int kSharedBytes = kBookkeepingOffset + int(sizeof(Bookkeeping));
  static_assert(!kQInRegisters || kQBytes <= kStageBytes);
  static_assert(kBlockM * kDim * 2 <= kBookkeepingOffset);
  static_assert(kKTileBytes % 1024 == 0 && kQBytes % 1024 == 0);
};

}  // namespace permattn::sm80
