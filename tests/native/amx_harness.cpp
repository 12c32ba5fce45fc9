// Forward and probe with emulated tiles behind C functions, for ctypes. One thread, no torch.
#define PERMATTN_TILE_HEADER "../../../tests/native/tile_emulation.h"
#include "../../csrc/cpu/isa/amx_bf16.cpp"

#include <vector>

#include "../../csrc/cpu/cpu.h"
#include "../../csrc/cpu/dispatch_internal.h"

#include "../../csrc/cpu/isa/target_avx512.h"
namespace permattn::cpu::preparing {
#include "../../csrc/cpu/kernel/base.inl"
#include "../../csrc/cpu/kernel/prepare.inl"
}  // namespace permattn::cpu::preparing
#include "../../csrc/cpu/isa/target_end.h"

namespace permattn::cpu {
Kernels select_kernels(Isa, Dtype dtype) {
  Kernels kernels = amx_bf16_kernels(dtype);
  preparing::add_prepare_kernels<preparing::BFloat16>(kernels);
  return kernels;
}
}  // namespace permattn::cpu

namespace {

void run_in_order(int64_t num_workers, void (*body)(void*, int64_t), void* context) {
  for (int64_t i = 0; i < num_workers; ++i) body(context, i);
}

permattn::IntView view(const int32_t* data, const int64_t* shape) {
  return {data, shape[0] == 1 ? 0 : shape[1] * shape[2], shape[1] == 1 ? 0 : shape[2], shape[2]};
}

}  // namespace

// sizes: B, Hq, Hkv, Sq, Skv, D, Dv; q, k, v, out bf16 and contiguous; plan_tensors, plan_shapes
// and plan_ints as core.packing.pack_plan makes them (contiguous). Without smoothing. Returns the
// number of tile products, or -1 when a tile was used wrongly.
extern "C" int amx_forward(const void* q, const void* k, const void* v, void* out, float* lse,
                           const int64_t* sizes, float scale, int64_t num_parts,
                           const int32_t* const* plan_tensors, const int64_t* plan_shapes,
                           const int64_t* plan_ints) {
  using namespace permattn;
  std::vector<PlanPart> parts;
  for (int64_t i = 0; i < num_parts; ++i) {
    const int64_t* n = plan_ints + 5 + 9 * i;
    IntView t[7];
    for (int j = 0; j < 7; ++j) t[j] = view(plan_tensors[7 * i + j], plan_shapes + 3 * (7 * i + j));
    PlanPart part{};
    part.q_perm = {t[0], t[1]};
    part.kv_perm = {t[2], t[3]};
    part.index = {t[4], t[5], t[6], n[0], n[1]};
    part.band = band_of(n[2] != 0, n[3], n[4] != 0, n[5]);
    part.group = static_cast<int32_t>(n[8]);
    parts.push_back(part);
  }
  FwdParams p{};
  p.problem = {Dtype::kBFloat16,
               sizes[0],
               sizes[1],
               sizes[2],
               sizes[3],
               sizes[4],
               static_cast<int32_t>(sizes[5]),
               static_cast<int32_t>(sizes[6]),
               scale,
               parts.data(),
               static_cast<int32_t>(num_parts)};
  const int64_t d = sizes[5], dv = sizes[6];
  p.q = {const_cast<void*>(q), sizes[1] * sizes[3] * d, sizes[3] * d, d};
  p.k = {const_cast<void*>(k), sizes[2] * sizes[4] * d, sizes[4] * d, d};
  p.v = {const_cast<void*>(v), sizes[2] * sizes[4] * dv, sizes[4] * dv, dv};
  p.out = {out, sizes[1] * sizes[3] * dv, sizes[3] * dv, dv};
  p.lse = lse;
  tile_emulation::state = {};
  if (plan_ints[0] == 0) {
    cpu::forward(p, Isa::kAmxBf16, {1, run_in_order});
  } else {
    constexpr Format kQk[] = {Format::kNone, Format::kInt8, Format::kInt4};
    constexpr Format kPv[] = {Format::kNone, Format::kFp8, Format::kInt8, Format::kInt4};
    QuantisedCall call{};
    call.qk = kQk[plan_ints[0]];
    call.pv = kPv[plan_ints[1]];
    call.q_rows = plan_ints[2];
    call.kv_rows = plan_ints[3];
    cpu::forward_quantised(p, call, Isa::kAmxBf16, {1, run_in_order});
  }
  const bool restored = tile_emulation::state.config[0] == 0;
  return tile_emulation::state.errors == 0 && restored ? tile_emulation::state.products : -1;
}

// sizes: B, Hq, Hkv, R, Skv, D; q and k bf16, everything contiguous; coordinates are positions.
extern "C" int amx_probe(const void* q, const void* k, const int32_t* first_position,
                         const int32_t* key_range, float* lse, float* column, float* square,
                         float* diagonal, const int64_t* sizes) {
  using namespace permattn;
  const int64_t d = sizes[5];
  ProbeParams p{};
  p.dtype = Dtype::kBFloat16;
  p.batch = sizes[0];
  p.q_heads = sizes[1];
  p.kv_heads = sizes[2];
  p.rows = sizes[3];
  p.skv = p.size = sizes[4];
  p.head_dim = static_cast<int32_t>(d);
  p.q = {const_cast<void*>(q), sizes[1] * sizes[3] * d, sizes[3] * d, d};
  p.k = {const_cast<void*>(k), sizes[2] * sizes[4] * d, sizes[4] * d, d};
  p.first_position = p.first_coordinate = first_position;
  p.key_range = key_range;
  p.lse = lse;
  p.column = column;
  p.square = square;
  p.diagonal = diagonal;
  tile_emulation::state = {};
  cpu::probe(p, Isa::kAmxBf16, {1, run_in_order});
  const bool restored = tile_emulation::state.config[0] == 0;
  return tile_emulation::state.errors == 0 && restored ? tile_emulation::state.products : -1;
}
