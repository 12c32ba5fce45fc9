// AMX bf16 tiles with an AVX-512 softmax (Sapphire Rapids and later); other dtypes run on
// avx512.cpp.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>

#include "../../common/token_rule.h"
#include "../cpu.h"
#include "../kernels.h"

#if defined(PERMATTN_TILE_HEADER)
#include PERMATTN_TILE_HEADER  // tests run this file on machines without tiles
#endif

#define PERMATTN_WIDTH 16
#define PERMATTN_CHUNK 96

#include "target_amx_bf16.h"
namespace permattn::cpu::amx_bf16 {
#include "../kernel/base.inl"
#include "../kernel/bf16_math.inl"
#include "../kernel/amx_math.inl"
#include "../kernel/softmax.inl"
#include "../kernel/forward.inl"
#include "../kernel/probe.inl"

static void forward_tile_on_tiles(const FwdTile& tile, std::byte* scratch) {
  const TileScope tiles;
  forward_tile<AmxMath>(tile, scratch);
}

static void probe_total_on_tiles(const ProbeTile& tile, std::byte* scratch) {
  const TileScope tiles;
  probe_total<AmxMath>(tile, scratch);
}

static void probe_mass_on_tiles(const ProbeTile& tile, std::byte* scratch) {
  const TileScope tiles;
  probe_mass<AmxMath>(tile, scratch);
}
}  // namespace permattn::cpu::amx_bf16
#include "target_end.h"

namespace permattn::cpu {
Kernels amx_bf16_kernels(Dtype dtype) {
  if (dtype != Dtype::kBFloat16) return {};
  Kernels kernels{};
  kernels.forward = amx_bf16::forward_tile_on_tiles;
  kernels.forward_rest = amx_bf16::forward_rest<amx_bf16::AmxMath>;
  kernels.forward_scratch = amx_bf16::forward_scratch<amx_bf16::AmxMath>;
  kernels.probe_total = amx_bf16::probe_total_on_tiles;
  kernels.probe_mass = amx_bf16::probe_mass_on_tiles;
  kernels.probe_scratch = amx_bf16::probe_scratch<amx_bf16::AmxMath>;
  return kernels;
}
}  // namespace permattn::cpu
#endif
