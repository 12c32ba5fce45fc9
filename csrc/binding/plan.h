// Tensors of a call as plain structs, with the checks that keep a kernel inside its memory.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "../common/params.h"
#include "../common/token_rule.h"

namespace permattn::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kTensorsPerPart = 7;
constexpr size_t kHeaderInts = 5;
constexpr size_t kIntsPerPart = 9;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "q: wants float32, bfloat16 or float16");
  }
}

inline TensorView view_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, ": wants 4 axes, got ", x.dim());
  // An empty tensor has no rows to step along, and torch gives an expanded one any strides.
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) <= 1 || x.numel() == 0, name,
                  ": the last stride must be 1, got ", x.stride(3));
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline IntView int_view_of(const Tensor& x, int64_t batch, int64_t heads, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.dim() == 3, name,
                  ": wants int32 [Bx, Hx, n]");
  STD_TORCH_CHECK(x.stride(2) == 1 || x.size(2) <= 1, name, ": the last stride must be 1, got ",
                  x.stride(2));
  STD_TORCH_CHECK((x.size(0) == 1 || x.size(0) == batch) && (x.size(1) == 1 || x.size(1) == heads),
                  name, ": leading axes must be 1 or [", batch, ", ", heads, "], got [", x.size(0),
                  ", ", x.size(1), "]");
  return {static_cast<const int32_t*>(x.data_ptr()), x.size(0) == 1 ? 0 : x.stride(0),
          x.size(1) == 1 ? 0 : x.stride(1), x.size(2)};
}

inline void check_result(const Tensor& x, const char* name, ScalarType dtype, int64_t b, int64_t h,
                         int64_t s) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.size(0) == b && x.size(1) == h && x.size(2) == s,
                  name, ": wrong dtype or shape");
}

// Reads `parts` out of core.packing.pack_plan's lists; the views live as long as the tensors.
std::vector<PlanPart> parts_of(const std::vector<Tensor>& tensors, const std::vector<int64_t>& ints,
                               const Problem& problem);

// Reads the transposed lists (indices, row_offsets, num_full of every part) into `parts`.
void add_transposed(std::vector<PlanPart>& parts, const std::vector<Tensor>& tensors,
                    const Problem& problem);

// Fills everything but `parts`, after checking that the shapes belong together.
Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale);

}  // namespace permattn::binding
