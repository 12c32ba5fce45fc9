// fp32 arithmetic for every dtype, forward and backward.
#include "base.inl"
#include "float_math.inl"
#include "softmax.inl"
#include "region_map.inl"
#include "region_gemm.inl"
#include "region_keys.inl"
#include "region_forward.inl"
#include "region_kernels.inl"

template <class Type>
RegionKernels region_kernels_of() {
  RegionKernels kernels{};
  add_region_forwards<FloatMath<Type>>(kernels);
  return kernels;
}

static RegionKernels float_region_kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return region_kernels_of<Float32>();
    case Dtype::kBFloat16:
      return region_kernels_of<BFloat16>();
    case Dtype::kFloat16:
      return region_kernels_of<Float16>();
  }
  return {};
}
