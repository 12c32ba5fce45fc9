// What every CPU operator checks and hands to the kernels.
#pragma once
#include <optional>

#include "../cpu/cpu.h"
#include "plan.h"

namespace permattn::binding {

// torch's own threads.
inline cpu::Pool torch_pool() {
  const auto run = [](int64_t num_workers, void (*body)(void*, int64_t), void* context) {
    torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(context, i);
    });
  };
  return {torch::stable::get_num_threads(), run};
}

// A number of the Isa enum; negative takes the best one.
inline Isa isa_of(int64_t number) {
  if (number < 0) return cpu::best_isa();
  const auto isa = static_cast<Isa>(number);
  STD_TORCH_CHECK(number < kNumIsas && cpu::isa_is_available(isa),
                  "isa: this machine has no number ", number);
  return isa;
}

// q, k, v, out and lse of a forward; the caller adds the parts.
inline FwdParams forward_params_of(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& out, const Tensor& lse, double scale) {
  FwdParams params{};
  Problem& problem = params.problem;
  problem = problem_of(q, k, v, scale);
  params.q = view_of(q, "q");
  params.k = view_of(k, "k");
  params.v = view_of(v, "v");
  params.out = view_of(out, "out");
  check_result(out, "out", q.scalar_type(), problem.batch, problem.q_heads, problem.sq);
  STD_TORCH_CHECK(out.size(3) == problem.head_dim_v, "out: wants the width of v");
  STD_TORCH_CHECK(lse.dim() == 3 && lse.is_contiguous(), "lse: wants contiguous [B, Hq, Sq]");
  check_result(lse, "lse", ScalarType::Float, problem.batch, problem.q_heads, problem.sq);
  params.lse = static_cast<float*>(lse.data_ptr());
  return params;
}

}  // namespace permattn::binding
