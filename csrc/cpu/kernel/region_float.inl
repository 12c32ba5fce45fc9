// fp32 arithmetic for every dtype, forward and backward.
#include "base.inl"
#include "float_math.inl"
#include "softmax.inl"
#include "region_map.inl"
#include "region_gemm.inl"
#include "region_keys.inl"
#include "region_forward.inl"
#include "region_kernels.inl"
#include "region_backward.inl"

template <class Math, int H>
static void add_region_backward(RegionKernels& kernels) {
  if constexpr (H <= kWidth) {
    kernels.backward[log2_of(H)] = region_backward<Math, H>;
    kernels.backward_scratch[log2_of(H)] = region_backward_scratch<Math, H>;
  }
}

template <class Math>
static void add_region_backwards(RegionKernels& kernels) {
  add_region_backward<Math, 1>(kernels);
  add_region_backward<Math, 2>(kernels);
  add_region_backward<Math, 4>(kernels);
  add_region_backward<Math, 8>(kernels);
}

template <class Type>
RegionKernels region_kernels_of() {
  RegionKernels kernels{};
  add_region_forwards<FloatMath<Type>>(kernels);
  add_region_backwards<FloatMath<Type>>(kernels);
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
