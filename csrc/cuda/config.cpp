#include "config.h"

#include "sm80/dispatch.h"
#include "sm90/config.h"

namespace permattn::cuda {
namespace {

// From here on the hardware emulates products of four bits.
constexpr int32_t kNoInt4From = 90;
constexpr int32_t kQuantisedBlockN = 64;

Format computed(Format format, int32_t capability) {
  return format == Format::kInt4 && capability >= kNoInt4From ? Format::kInt8 : format;
}

int32_t wider(const Shape& shape) {
  return shape.head_dim > shape.head_dim_v ? shape.head_dim : shape.head_dim_v;
}

// Tiles of 128 queries where as many share their lists, if there is such a kernel.
int32_t rows_of(const Shape& shape, Format qk, Format pv) {
  const bool fits = sm80::tile_shape(qk, pv, padded_dim(wider(shape)), 128).block_m != 0;
  return fits && shape.unit % 128 == 0 ? 128 : 64;
}

}  // namespace

const char* why_not(const Shape& shape) {
  if (shape.capability < 80) return "needs compute capability 8.0 or newer";
  if (shape.dtype != Dtype::kBFloat16 && shape.dtype != Dtype::kFloat16) {
    return "computes in bfloat16 or float16";
  }
  if (shape.head_dim < 8 || shape.head_dim_v < 8 || shape.head_dim % 8 != 0 ||
      shape.head_dim_v % 8 != 0 || wider(shape) > 256) {
    return "takes head dims that are multiples of 8 up to 256";
  }
  if (shape.qk == Format::kNone && shape.pv != Format::kNone) {
    return "quantises P and V only together with Q and K";
  }
  if (shape.pv == Format::kFp8 && shape.capability != 89 && shape.capability != 90 &&
      shape.capability < 120) {
    return "multiplies FP8 on compute capability 8.9, 9.0 and 12.0";
  }
  if (shape.pv != Format::kNone && shape.kv_rows != kQuantisedBlockN) {
    return "with quantised P and V, takes kv_rows_per_scale of 64";
  }
  const Format qk = computed(shape.qk, shape.capability), pv = computed(shape.pv, shape.capability);
  if (pv != shape.pv) return "multiplies INT4 probabilities before compute capability 9.0 only";
  if (qk == Format::kInt4 && shape.head_dim % 32 != 0) {
    return "takes INT4 rows of whole 16 bytes: head dims that are multiples of 32";
  }
  if (qk == Format::kInt8 && shape.head_dim % 16 != 0) {
    return "takes INT8 rows of whole 16 bytes: head dims that are multiples of 16";
  }
  if (sm90::config_of(shape, qk, pv).block_m != 0) return nullptr;
  if (!sm80::has_kernel(qk, pv)) return "has no kernel for these formats";
  if (sm80::tile_shape(qk, pv, padded_dim(wider(shape)), 64).block_m == 0) {
    return "with quantised P and V, takes head dims up to 128";
  }
  return nullptr;
}

Config select_config(const Shape& shape) {
  Config config{};
  config.qk = computed(shape.qk, shape.capability);
  config.pv = computed(shape.pv, shape.capability);
  const Config for_hopper = sm90::config_of(shape, config.qk, config.pv);
  if (for_hopper.block_m != 0) return for_hopper;
  config.family = Family::kSm80;
  config.dim = padded_dim(wider(shape));
  const sm80::TileShape tile =
      sm80::tile_shape(config.qk, config.pv, config.dim, rows_of(shape, config.qk, config.pv));
  config.block_m = tile.block_m;
  config.block_n = tile.block_n;
  config.warps = tile.warps;
  config.stages = tile.stages;
  return config;
}

}  // namespace permattn::cuda
