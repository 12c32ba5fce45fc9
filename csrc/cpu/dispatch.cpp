// Which instruction sets this machine has, and which kernel runs a problem.
#include "dispatch_internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace permattn::cpu {
namespace {

#if defined(__x86_64__)
struct Cpuid {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  Cpuid(uint32_t leaf, uint32_t subleaf) { __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d); }
};

// The kernel must ask Linux for the tile registers once per process; using them unasked is SIGILL.
bool amx_is_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      (Cpuid(1, 0).c >> 29 & 1) == 0) {  // F16C
    return Isa::kPortable;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx2;
  }
  if (!__builtin_cpu_supports("avx512vnni")) return Isa::kAvx512;
  if ((Cpuid(7, 1).a >> 5 & 1) == 0) return Isa::kAvx512Vnni;  // AVX512_BF16
  const uint32_t features = Cpuid(7, 0).d;
  constexpr uint32_t kTiles = 1U << 22 | 1U << 24 | 1U << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  return (features & kTiles) == kTiles && amx_is_granted() ? Isa::kAmxBf16 : Isa::kAvx512Bf16;
}
#else
Isa detect() { return Isa::kPortable; }
#endif

Kernels kernels_of(Isa isa, Dtype dtype) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmxBf16:
      return amx_bf16_kernels(dtype);
    case Isa::kAvx512Bf16:
      return avx512_bf16_kernels(dtype);
    case Isa::kAvx512Vnni:
      return avx512_vnni_kernels(dtype);
    case Isa::kAvx512:
      return avx512_kernels(dtype);
    case Isa::kAvx2:
      return avx2_kernels(dtype);
#endif
    default:
      return portable_kernels(dtype);
  }
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

bool isa_is_available(Isa isa) { return isa >= Isa::kPortable && isa <= best_isa(); }

Kernels select_kernels(Isa isa, Dtype dtype) {
  Kernels chosen{};
  for (int32_t i = static_cast<int32_t>(isa); i >= 0; --i) {
    const Kernels kernels = kernels_of(static_cast<Isa>(i), dtype);
    if (chosen.forward == nullptr) {
      chosen.forward = kernels.forward;
      chosen.forward_rest = kernels.forward_rest;
      chosen.forward_scratch = kernels.forward_scratch;
    }
    if (chosen.backward == nullptr) {
      chosen.backward = kernels.backward;
      chosen.backward_delta = kernels.backward_delta;
      chosen.backward_scratch = kernels.backward_scratch;
    }
    if (chosen.probe_mass == nullptr) {
      chosen.probe_total = kernels.probe_total;
      chosen.probe_mass = kernels.probe_mass;
      chosen.probe_scratch = kernels.probe_scratch;
    }
    if (chosen.prepare == nullptr) {
      chosen.prepare = kernels.prepare;
      chosen.prepare_columns = kernels.prepare_columns;
      chosen.prepare_tokens = kernels.prepare_tokens;
      chosen.prepare_scratch = kernels.prepare_scratch;
    }
    if (chosen.route_affinity == nullptr) {
      chosen.route_means_by_row = kernels.route_means_by_row;
      chosen.route_means_by_channel = kernels.route_means_by_channel;
      chosen.route_means_scratch = kernels.route_means_scratch;
      chosen.route_affinity = kernels.route_affinity;
      chosen.route_affinity_scratch = kernels.route_affinity_scratch;
      chosen.route_pick = kernels.route_pick;
    }
    for (int32_t kind = 0; kind < kNumValueKinds; ++kind) {
      if (chosen.forward_quantised[kind] != nullptr) continue;
      chosen.forward_quantised[kind] = kernels.forward_quantised[kind];
      chosen.quantised_scratch[kind] = kernels.quantised_scratch[kind];
      if (kind == static_cast<int32_t>(ValueKind::kInteger)) {
        chosen.value_layout = kernels.value_layout;
      }
    }
  }
  return chosen;
}

}  // namespace permattn::cpu
