#include "probe.h"

namespace permattn::binding {
namespace {

const int32_t* int_pointer_of(const Tensor& x, const char* name, int64_t size) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.is_contiguous() && x.numel() == size,
                  name, ": wants ", size, " contiguous int32");
  return static_cast<const int32_t*>(x.data_ptr());
}

// The axis of a probe: where its rows stand and which key lies at every coordinate.
void add_axis(ProbeParams& params, const Tensor& first_position, const Tensor& first_coordinate,
              const Tensor& key_range, const std::optional<Tensor>& order) {
  params.first_position = int_pointer_of(first_position, "first_position", params.batch);
  params.first_coordinate = int_pointer_of(first_coordinate, "first_coordinate", params.batch);
  params.key_range = int_pointer_of(key_range, "key_range", 2 * params.batch);
  params.size = params.skv;
  if (!order.has_value()) return;
  STD_TORCH_CHECK(order->dim() == 2 && (order->size(0) == 1 || order->size(0) == params.batch),
                  "order: wants [1 or B, n]");
  params.size = order->size(1);
  params.order = int_pointer_of(*order, "order", order->size(0) * params.size);
  params.order_stride_b = order->size(0) == 1 ? 0 : params.size;
}

void add_results(ProbeParams& params, const ProbeTensors& x) {
  for (const Tensor* result : {&x.lse, &x.column, &x.square, &x.diagonal}) {
    STD_TORCH_CHECK(result->dim() == 3 && result->is_contiguous(),
                    "results: want contiguous [B, Hq, n]");
    const int64_t width = result == &x.lse ? params.rows : params.size;
    check_result(*result, "results", ScalarType::Float, params.batch, params.q_heads, width);
  }
  params.lse = static_cast<float*>(x.lse.data_ptr());
  params.column = static_cast<float*>(x.column.data_ptr());
  params.square = static_cast<float*>(x.square.data_ptr());
  params.diagonal = static_cast<float*>(x.diagonal.data_ptr());
}

}  // namespace

ProbeParams probe_params_of(const ProbeTensors& x, int64_t most) {
  const Problem problem = problem_of(x.q, x.k, x.k, 1.0);
  ProbeParams params{};
  params.dtype = problem.dtype;
  params.batch = problem.batch;
  params.q_heads = problem.q_heads;
  params.kv_heads = problem.kv_heads;
  params.rows = problem.sq;
  params.skv = problem.skv;
  params.head_dim = problem.head_dim;
  params.lse_is_given = x.lse_is_given;
  params.q = view_of(x.q, "q");
  params.k = view_of(x.k, "k");
  STD_TORCH_CHECK(params.rows >= 1 && params.rows <= most, "q: wants 1 to ", most, " rows, got ",
                  params.rows);
  add_axis(params, x.first_position, x.first_coordinate, x.key_range, x.order);
  if (x.skip.has_value()) {
    STD_TORCH_CHECK(x.skip->is_contiguous() && x.skip->dim() == 3,
                    "skip: wants contiguous [B, Hq, n]");
    check_result(*x.skip, "skip", ScalarType::Bool, params.batch, params.q_heads, params.size);
    params.skip = static_cast<const uint8_t*>(x.skip->data_ptr());
  }
  add_results(params, x);
  return params;
}

}  // namespace permattn::binding
