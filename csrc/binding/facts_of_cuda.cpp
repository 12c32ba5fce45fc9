// What this library holds of CUDA, and which kernel a problem gets: numbers and words, no tensors.
#include <string>

#include "../cuda/config.h"
#include "plan.h"

#if defined(PERMATTN_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace permattn::binding {
namespace {

constexpr size_t kShapeInts = 10;

// capability, dtype, qk, pv, D, Dv, unit, block_kv, q_rows, kv_rows.
cuda::Shape shape_of(const std::vector<int64_t>& n) {
  STD_TORCH_CHECK(n.size() == kShapeInts, "shape: wants ", kShapeInts, " integers, got ", n.size());
  STD_TORCH_CHECK(n[1] >= 0 && n[1] <= 2 && n[2] >= 0 && n[2] <= 3 && n[3] >= 0 && n[3] <= 3,
                  "shape: no dtype or format of that number");
  for (const int64_t each : n) {
    STD_TORCH_CHECK(each >= 0 && each <= INT32_MAX, "shape: wants numbers of 31 bits, got ", each);
  }
  const auto at = [&](size_t i) { return static_cast<int32_t>(n[i]); };
  return {at(0),
          static_cast<Dtype>(at(1)),
          static_cast<Format>(at(2)),
          static_cast<Format>(at(3)),
          at(4),
          at(5),
          at(6),
          at(7),
          at(8),
          at(9)};
}

std::string cuda_why_not(std::vector<int64_t> shape) {
  const char* why = cuda::why_not(shape_of(shape));
  return why == nullptr ? "" : why;
}

// family, dim, block_m, block_n, warps, stages, qk, pv: a Config as it stands.
std::vector<int64_t> cuda_config(std::vector<int64_t> shape) {
  const cuda::Shape s = shape_of(shape);
  const char* why = cuda::why_not(s);
  STD_TORCH_CHECK(why == nullptr, "cuda_config: ", why);
  const cuda::Config c = cuda::select_config(s);
  return {static_cast<int64_t>(c.family),
          c.dim,
          c.block_m,
          c.block_n,
          c.warps,
          c.stages,
          static_cast<int64_t>(c.qk),
          static_cast<int64_t>(c.pv)};
}

// Compute capabilities with machine code here, ascending. Code for 9.0 and newer is for exactly
// that one.
std::vector<int64_t> cuda_archs() {
#if defined(PERMATTN_CUDA_ARCHS)
  return {PERMATTN_CUDA_ARCHS};
#else
  return {};
#endif
}

// The compute capability whose PTX is here, which drivers compile for newer ones; 0: none.
int64_t cuda_ptx_arch() {
#if defined(PERMATTN_CUDA_PTX)
  return PERMATTN_CUDA_PTX;
#else
  return 0;
#endif
}

// CUDA's version as major * 1000 + minor * 10; 0: no CUDA here.
int64_t cuda_version() {
#if defined(PERMATTN_CUDA)
  return CUDART_VERSION;
#else
  return 0;
#endif
}

// What keeps this library from the devices of this machine; empty: nothing does.
std::string cuda_driver_problem() {
#if defined(PERMATTN_CUDA)
  int count = 0, driver = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count > 0 ? "" : "there is no CUDA device";
  // Not sticky, but the next caller must not find it.
  static_cast<void>(cudaGetLastError());
  std::string why = cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess) {
    const auto version = [](int v) {
      return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
    };
    why = driver == 0 ? "there is no CUDA driver"
                      : "the driver supports CUDA " + version(driver) +
                            ", the library was built with " + version(CUDART_VERSION);
  }
  return why;
#else
  return "the library was built without CUDA";
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(permattn_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_why_not", TORCH_BOX(&cuda_why_not));
  m.impl("cuda_config", TORCH_BOX(&cuda_config));
  m.impl("cuda_archs", TORCH_BOX(&cuda_archs));
  m.impl("cuda_ptx_arch", TORCH_BOX(&cuda_ptx_arch));
  m.impl("cuda_version", TORCH_BOX(&cuda_version));
  m.impl("cuda_driver_problem", TORCH_BOX(&cuda_driver_problem));
}

}  // namespace permattn::binding
