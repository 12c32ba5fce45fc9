// The family's rows of the tile choice; see ../config.h.
#pragma once
#include "../config.h"
#include "shape.h"

namespace permattn::sm90 {

// The kernel for a shape that `why_not` let pass, with formats as computed; block_m 0: there is
// none, and the kernels for older hardware take it. Tiles of 64 queries come in pairs: a block
// takes two that follow each other, with lists of their own.
constexpr cuda::Config config_of(const cuda::Shape& shape, Format qk, Format pv) {
  const int32_t wider = shape.head_dim > shape.head_dim_v ? shape.head_dim : shape.head_dim_v;
  cuda::Config config{};
  config.family = cuda::Family::kSm90;
  config.dim = cuda::padded_dim(wider);
  config.qk = qk;
  config.pv = pv;
  if (shape.capability != 90 || config.dim == 0) return config;
  const bool is_shared = shape.unit % (kHalves * kHalfRows) == 0;
  // Wide tiles of keys where entries fill them, or where both halves want the same ones.
  const bool is_wide = is_shared || shape.block_kv % 128 == 0;
  TileShape tile = is_wide ? tile_shape(qk, pv, config.dim, 128) : TileShape{};
  if (tile.block_n == 0) tile = tile_shape(qk, pv, config.dim, 64);
  if (tile.block_n == 0) return config;
  config.block_m = is_shared ? kHalves * kHalfRows : kHalfRows;
  config.block_n = tile.block_n;
  config.warps = config.block_m / 16;
  config.stages = tile.stages;
  return config;
}

}  // namespace permattn::sm90
