// Attention from region to region: checks and plain structs.
#include <array>

#include "cpu_common.h"

namespace permattn::binding {
namespace {

using Shape = std::array<int64_t, 6>;

MapView map_view_of(const Tensor& x, const char* name, ScalarType dtype, const Shape& shape) {
  STD_TORCH_CHECK(x.dim() == 6 && x.scalar_type() == dtype, name, ": wants 6 axes of q's dtype");
  for (int i = 0; i < 6; ++i) {
    STD_TORCH_CHECK(x.size(i) == shape[i], name, ": wants size ", shape[i], " of axis ", i,
                    ", got ", x.size(i));
  }
  // The stride of an axis of size 1 means nothing.
  const int64_t last = x.size(5) == 1 ? 1 : x.stride(5);
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4), last};
}

RegionGrid grid_of(const Tensor& x, const int64_t* box) {
  constexpr int64_t kMostCells = int64_t{1} << 28;
  RegionGrid grid{};
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(box[i] >= 1 && box[i] <= INT32_MAX && x.size(2 + i) >= 1,
                    "boxes: wants 1 or "
                    "more tokens, got ",
                    box[i], " of ", x.size(2 + i));
    grid.size[i] = x.size(2 + i);
    grid.box[i] = box[i];
    grid.counts[i] = (grid.size[i] + box[i] - 1) / box[i];
  }
  STD_TORCH_CHECK(grid.num_tokens() <= INT32_MAX && grid.box[0] <= kMostCells / grid.box[1] &&
                      grid.box[0] * grid.box[1] <= kMostCells / grid.box[2],
                  "q, k: too many tokens of a map or a box");
  return grid;
}

// [B or 1, M or 1, Rq, topk], contiguous; the strides of its leading axes.
std::array<int64_t, 2> places_of(const Tensor& x, const char* name, const RegionParams& p) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous() && (x.size(0) == 1 || x.size(0) == p.batch) &&
                      (x.size(1) == 1 || x.size(1) == p.heads) &&
                      x.size(2) == p.q_grid.num_regions() && x.size(3) == p.topk,
                  name, ": wants contiguous [B or 1, M or 1, ", p.q_grid.num_regions(), ", ",
                  p.topk, "]");
  const int64_t head = x.size(2) * x.size(3);
  return {x.size(0) == 1 ? 0 : x.size(1) * head, x.size(1) == 1 ? 0 : head};
}

Shape shape_of(const Tensor& x, int64_t width) {
  return {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4), width};
}

const float* per_token(const Tensor& x, const char* name, const RegionParams& p) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() &&
                      x.numel() == p.batch * p.heads * p.q_grid.num_tokens(),
                  name, ": wants contiguous float32 [B, M, T, H, W]");
  return static_cast<const float*>(x.data_ptr());
}

// boxes: of q, then of k.
RegionParams region_params_of(const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& graph, const std::optional<Tensor>& weights,
                              const Tensor& out, const Tensor& lse,
                              const std::vector<int64_t>& boxes, bool count_padding, double scale) {
  STD_TORCH_CHECK(q.dim() == 6 && k.dim() == 6 && v.dim() == 6 && graph.dim() == 4,
                  "q, k, v, graph: want 6, 6, 6 and 4 axes");
  STD_TORCH_CHECK(boxes.size() == 6, "boxes: wants 6 integers, got ", boxes.size());
  RegionParams p{};
  p.dtype = dtype_of(q);
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.scale = static_cast<float>(scale);
  p.count_padding = count_padding;
  p.q_grid = grid_of(q, boxes.data());
  p.kv_grid = grid_of(k, boxes.data() + 3);
  const int64_t dim = q.size(5), dim_v = v.size(5);
  STD_TORCH_CHECK(dim >= 1 && dim <= 256 && dim_v >= 1 && dim_v <= 256,
                  "head dim: wants 1 to 256, got D = ", dim, ", Dv = ", dim_v);
  p.head_dim = static_cast<int32_t>(dim);
  p.head_dim_v = static_cast<int32_t>(dim_v);
  Shape keys = shape_of(k, dim);
  keys[0] = p.batch;
  keys[1] = p.heads;
  const ScalarType dtype = q.scalar_type();
  p.q = map_view_of(q, "q", dtype, shape_of(q, dim));
  p.k = map_view_of(k, "k", dtype, keys);
  keys[5] = dim_v;
  p.v = map_view_of(v, "v", dtype, keys);
  p.out = map_view_of(out, "out", dtype, shape_of(q, dim_v));
  p.lse = const_cast<float*>(per_token(lse, "lse", p));
  p.topk = graph.size(3);
  STD_TORCH_CHECK(graph.scalar_type() == ScalarType::Int, "graph: wants int32");
  const auto [graph_b, graph_m] = places_of(graph, "graph", p);
  p.graph = static_cast<const int32_t*>(graph.data_ptr());
  p.graph_stride_b = graph_b;
  p.graph_stride_m = graph_m;
  if (weights.has_value()) {
    STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Float, "weights: wants float32");
    const auto [weights_b, weights_m] = places_of(*weights, "weights", p);
    p.weights = static_cast<const float*>(weights->data_ptr());
    p.weights_stride_b = weights_b;
    p.weights_stride_m = weights_m;
  }
  return p;
}

void cpu_attend_regions(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& graph,
                        std::optional<Tensor> weights, const Tensor& out, const Tensor& lse,
                        std::vector<int64_t> boxes, bool count_padding, double scale, int64_t isa) {
  cpu::attend_regions(
      region_params_of(q, k, v, graph, weights, out, lse, boxes, count_padding, scale), isa_of(isa),
      torch_pool());
}

// dweights is zeros on entry.
void cpu_attend_regions_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& graph, std::optional<Tensor> weights,
                                 const Tensor& out, const Tensor& lse, const Tensor& dout,
                                 const Tensor& dlse, const Tensor& dq, const Tensor& dk,
                                 const Tensor& dv, std::optional<Tensor> dweights,
                                 std::vector<int64_t> boxes, bool count_padding, double scale,
                                 int64_t isa) {
  RegionBwdParams b{};
  RegionParams& p = b.forward;
  p = region_params_of(q, k, v, graph, weights, out, lse, boxes, count_padding, scale);
  const ScalarType dtype = q.scalar_type();
  b.dout = map_view_of(dout, "dout", dtype, shape_of(q, p.head_dim_v));
  b.dlse = per_token(dlse, "dlse", p);
  b.dq = map_view_of(dq, "dq", dtype, shape_of(q, p.head_dim));
  b.dk = map_view_of(dk, "dk", dtype, shape_of(k, p.head_dim));
  b.dv = map_view_of(dv, "dv", dtype, shape_of(v, p.head_dim_v));
  if (dweights.has_value()) {
    STD_TORCH_CHECK(dweights->scalar_type() == ScalarType::Float && dweights->is_contiguous() &&
                        dweights->numel() == p.batch * p.heads * p.q_grid.num_regions() * p.topk,
                    "dweights: wants contiguous float32 [B, M, Rq, topk]");
    b.dweights = static_cast<float*>(dweights->data_ptr());
  }
  cpu::attend_regions_backward(b, isa_of(isa), torch_pool());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(permattn_native, CPU, m) {
  m.impl("cpu_attend_regions", TORCH_BOX(&cpu_attend_regions));
  m.impl("cpu_attend_regions_backward", TORCH_BOX(&cpu_attend_regions_backward));
}

}  // namespace permattn::binding
