// The CPU operators: checks, plain structs, torch's own thread pool.
#include "../cpu/kernels.h"
#include "cpu_common.h"
#include "probe.h"

namespace permattn::binding {
namespace {

void cpu_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                 const Tensor& lse, std::vector<Tensor> plan_tensors,
                 std::vector<int64_t> plan_ints, double scale, int64_t isa) {
  FwdParams params = forward_params_of(q, k, v, out, lse, scale);
  Problem& problem = params.problem;
  const std::vector<PlanPart> parts = parts_of(plan_tensors, plan_ints, problem);
  problem.parts = parts.data();
  problem.num_parts = static_cast<int32_t>(parts.size());
  cpu::forward(params, isa_of(isa), torch_pool());
}

// dq, dk and dv are float32 zeros, whatever the inputs' dtype.
void cpu_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                  const Tensor& lse, const Tensor& dout, const Tensor& dlse, const Tensor& dq,
                  const Tensor& dk, const Tensor& dv, std::vector<Tensor> plan_tensors,
                  std::vector<Tensor> transposed_tensors, std::vector<int64_t> plan_ints,
                  double scale, int64_t isa) {
  BwdParams params{};
  Problem& problem = params.problem;
  problem = problem_of(q, k, v, scale);
  std::vector<PlanPart> parts = parts_of(plan_tensors, plan_ints, problem);
  add_transposed(parts, transposed_tensors, problem);
  problem.parts = parts.data();
  problem.num_parts = static_cast<int32_t>(parts.size());
  params.q = view_of(q, "q");
  params.k = view_of(k, "k");
  params.v = view_of(v, "v");
  params.out = view_of(out, "out");
  params.dout = view_of(dout, "dout");
  for (const Tensor* x : {&out, &dout}) {
    check_result(*x, "out, dout", q.scalar_type(), problem.batch, problem.q_heads, problem.sq);
    STD_TORCH_CHECK(x->size(3) == problem.head_dim_v, "out, dout: want the width of v");
  }
  for (const Tensor* x : {&lse, &dlse, &dq, &dk, &dv}) {
    STD_TORCH_CHECK(x->is_contiguous(), "lse, dlse, dq, dk, dv: want contiguous tensors");
  }
  check_result(lse, "lse", ScalarType::Float, problem.batch, problem.q_heads, problem.sq);
  check_result(dlse, "dlse", ScalarType::Float, problem.batch, problem.q_heads, problem.sq);
  check_result(dq, "dq", ScalarType::Float, problem.batch, problem.q_heads, problem.sq);
  check_result(dk, "dk", ScalarType::Float, problem.batch, problem.kv_heads, problem.skv);
  check_result(dv, "dv", ScalarType::Float, problem.batch, problem.kv_heads, problem.skv);
  STD_TORCH_CHECK(dq.size(3) == problem.head_dim && dk.size(3) == problem.head_dim &&
                      dv.size(3) == problem.head_dim_v,
                  "dq, dk, dv: want the widths of q, k, v");
  params.lse = static_cast<const float*>(lse.data_ptr());
  params.dlse = static_cast<const float*>(dlse.data_ptr());
  params.dq = static_cast<float*>(dq.data_ptr());
  params.dk = static_cast<float*>(dk.data_ptr());
  params.dv = static_cast<float*>(dv.data_ptr());
  cpu::backward(params, isa_of(isa), torch_pool());
}

// diagonal is zeros on entry.
void cpu_probe(const Tensor& q, const Tensor& k, const Tensor& first_position,
               const Tensor& first_coordinate, const Tensor& key_range, std::optional<Tensor> order,
               std::optional<Tensor> skip, bool lse_is_given, const Tensor& lse,
               const Tensor& column, const Tensor& square, const Tensor& diagonal, int64_t isa) {
  const ProbeTensors x{q,         k,      first_position, first_coordinate,
                       key_range, order,  skip,           lse_is_given,
                       lse,       column, square,         diagonal};
  const ProbeParams params = probe_params_of(x, cpu::kTileLanes);
  cpu::probe(params, isa_of(isa), torch_pool());
}

int64_t cpu_best_isa() { return static_cast<int64_t>(cpu::best_isa()); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(permattn_native, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&cpu_backward));
  m.impl("cpu_probe", TORCH_BOX(&cpu_probe));
}

STABLE_TORCH_LIBRARY_IMPL(permattn_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_best_isa", TORCH_BOX(&cpu_best_isa));
}

}  // namespace permattn::binding
