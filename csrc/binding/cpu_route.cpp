// The CPU operator of routing.
#include "../common/route.h"
#include "cpu_common.h"

namespace permattn::binding {
namespace {

// `box` holds three sizes.
BoxedMap map_of(const Tensor& x, const int64_t* box, const char* name) {
  STD_TORCH_CHECK(x.dim() == 6, name, ": wants 6 axes, got ", x.dim());
  BoxedMap map{};
  map.data = x.data_ptr();
  map.heads = x.size(1);
  map.dim = x.size(5);
  map.stride_b = x.stride(0);
  map.stride_m = x.stride(1);
  map.stride_d = x.stride(5);
  STD_TORCH_CHECK(map.heads >= 1 && map.dim >= 1, name, ": wants at least one channel");
  for (int axis = 0; axis < 3; ++axis) {
    map.size[axis] = x.size(2 + axis);
    map.stride[axis] = x.stride(2 + axis);
    map.box[axis] = box[axis];
    STD_TORCH_CHECK(map.size[axis] >= 1 && box[axis] >= 1, name, ": wants sizes of at least 1");
    map.counts[axis] = (map.size[axis] - 1) / box[axis] + 1;
  }
  STD_TORCH_CHECK(map.regions() <= INT32_MAX, name, ": too many regions for int32");
  return map;
}

void check_routed(const Tensor& x, const char* name, ScalarType dtype, const RouteParams& params) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), name, ": wants contiguous [B, Rq, topk]");
  check_result(x, name, dtype, params.batch, params.q.regions(), params.topk);
}

// `boxes` are those of q, then of k, three sizes each.
void cpu_route(const Tensor& q, const Tensor& k, std::vector<int64_t> boxes, int64_t topk,
               double scale, const Tensor& graph, const Tensor& values, int64_t isa) {
  STD_TORCH_CHECK(boxes.size() == 6, "boxes: wants 6 sizes, got ", boxes.size());
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type(), "k: wants the dtype of q");
  RouteParams params{};
  params.dtype = dtype_of(q);
  params.batch = q.size(0);
  params.topk = topk;
  params.scale = static_cast<float>(scale);
  params.q = map_of(q, &boxes[0], "q");
  params.k = map_of(k, &boxes[3], "k");
  STD_TORCH_CHECK(
      k.size(0) == params.batch && params.k.heads == params.q.heads && params.k.dim == params.q.dim,
      "k: wants the batch, heads and width of q");
  STD_TORCH_CHECK(topk >= 1 && topk <= params.k.regions(), "topk: wants 1 to ", params.k.regions(),
                  ", got ", topk);
  check_routed(graph, "graph", ScalarType::Int, params);
  check_routed(values, "values", ScalarType::Float, params);
  params.graph = static_cast<int32_t*>(graph.data_ptr());
  params.values = static_cast<float*>(values.data_ptr());
  cpu::route(params, isa_of(isa), torch_pool());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(permattn_native, CPU, m) { m.impl("cpu_route", TORCH_BOX(&cpu_route)); }

}  // namespace permattn::binding
