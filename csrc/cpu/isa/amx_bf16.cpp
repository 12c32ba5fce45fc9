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
#include "../kernel/int_math.inl"
#include "../kernel/vnni_math.inl"
#include "../kernel/amx_int_math.inl"
#include "../kernel/softmax.inl"
#include "../kernel/forward.inl"
#include "../kernel/probe.inl"
#include "../kernel/quantised.inl"

static void forward_tile_on_tiles(const FwdTile& tile, std::byte* scratch) {
  const TileScope tiles;
  forward_tile<AmxMath>(tile, scratch);
}

template <class Values>
static void quantised_on_tiles(const FwdTile& tile, std::byte* scratch) {
  const TileScope tiles;
  forward_quantised_tile<TileProducts, Values>(tile, scratch);
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
  using namespace amx_bf16;
  Kernels kernels{};
  for (auto& size : kernels.quantised_scratch) size = quantised_scratch<TileProducts>;
  FwdTileFn* quantised = kernels.forward_quantised;
  quantised[static_cast<int32_t>(ValueKind::kInteger)] =
      quantised_on_tiles<IntegerValues<TileProducts>>;
  quantised[static_cast<int32_t>(ValueKind::kFp8)] =
      quantised_on_tiles<Fp8Values<TileProducts, AmxMath>>;
  kernels.value_layout = TileProducts::kValueLayout;
  if (dtype != Dtype::kBFloat16) return kernels;
  quantised[static_cast<int32_t>(ValueKind::kPlain)] =
      quantised_on_tiles<PlainValues<TileProducts, AmxMath>>;
  kernels.forward = forward_tile_on_tiles;
  kernels.forward_rest = forward_rest<AmxMath>;
  kernels.forward_scratch = forward_scratch<AmxMath>;
  kernels.probe_total = probe_total_on_tiles;
  kernels.probe_mass = probe_mass_on_tiles;
  kernels.probe_scratch = probe_scratch<AmxMath>;
  return kernels;
}
}  // namespace permattn::cpu
#endif
