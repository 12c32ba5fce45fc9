// fp32 arithmetic for every dtype, forward, backward and probe.
#include "base.inl"
#include "float_math.inl"
#include "softmax.inl"
#include "forward.inl"
#include "backward.inl"
#include "probe.inl"
#include "prepare.inl"
#include "route.inl"
#include "int_math.inl"
#include "quantised.inl"

template <class Type>
Kernels kernels_of() {
  using Math = FloatMath<Type>;
  Kernels kernels{};
  kernels.forward = forward_tile<Math>;
  kernels.forward_rest = forward_rest<Math>;
  kernels.forward_scratch = forward_scratch<Math>;
  kernels.backward = backward_tile<Math>;
  kernels.backward_delta = backward_delta<Math>;
  kernels.backward_scratch = backward_scratch<Math>;
  kernels.probe_total = probe_total<Math>;
  kernels.probe_mass = probe_mass<Math>;
  kernels.probe_scratch = probe_scratch<Math>;
  add_prepare_kernels<Type>(kernels);
  add_route_kernels<Type>(kernels);
  using Products = VectorProducts<PairBytes>;
  add_integer_kernels<Products>(kernels);
  add_plain_kernels<Products, Math>(kernels);
  add_fp8_kernels<Products, FloatMath<BFloat16>>(kernels);
  return kernels;
}

static Kernels float_kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return kernels_of<Float32>();
    case Dtype::kBFloat16:
      return kernels_of<BFloat16>();
    case Dtype::kFloat16:
      return kernels_of<Float16>();
  }
  return {};
}
