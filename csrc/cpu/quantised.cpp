// Quantised forward of a whole plan: every order of rows is prepared once, in the layouts that the
// chosen kernel reads, and then the tiles run as any forward's.
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispatch_internal.h"
#include "passes.h"
#include "schedule.h"

namespace permattn::cpu {
namespace {

// Uninitialised memory with room for kernels that read whole register blocks.
class Buffer {
 public:
  explicit Buffer(size_t bytes) {
    constexpr size_t kSlack = 16 * 1024, kHuge = 2 << 20;
    bytes += kSlack;
    const size_t unit = bytes >= 2 * kHuge ? kHuge : 64;
    bytes = (bytes + unit - 1) / unit * unit;
    data_ = static_cast<std::byte*>(std::aligned_alloc(unit, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (unit == kHuge) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  std::byte* data() const { return data_; }

 private:
  std::byte* data_;
};

using Buffers = std::vector<std::unique_ptr<Buffer>>;

int64_t ceil_to(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

bool same_order(const IntView& a, const IntView& b) {
  return a.data == b.data && a.size == b.size && a.stride_b == b.stride_b &&
         a.stride_h == b.stride_h;
}

struct Preparation {
  const FwdParams& params;
  const QuantisedCall& call;
  const Kernels& kernels;
  const Pool& pool;
  Buffers& buffers;

  PrepareParams source(const TensorView& x, const PermView& perm, int64_t heads,
                       int32_t dim) const {
    const Problem& problem = params.problem;
    PrepareParams p{};
    p.dtype = problem.dtype;
    p.batch = problem.batch;
    p.heads = heads;
    p.out_heads = perm.token_of_slot.stride_h == 0 ? heads : problem.q_heads;
    p.tokens = perm.slot_of_token.size;
    p.slots = perm.token_of_slot.size;
    p.dim = dim;
    p.x = x;
    p.token_of_slot = perm.token_of_slot;
    return p;
  }

  // Allocates `bytes_per_group` for every group of every head, and fills it.
  PreparedRows run(PrepareParams& p, int64_t rows_per_group, int64_t bytes_per_group) const {
    const int64_t groups = (p.slots + rows_per_group - 1) / rows_per_group;
    const int64_t heads = p.batch * p.out_heads;
    p.rows_per_scale = rows_per_group;
    p.padded_slots = groups * rows_per_group;
    p.head_stride = groups * bytes_per_group;
    buffers.push_back(std::make_unique<Buffer>(heads * p.head_stride));
    p.rows = buffers.back()->data();
    if (p.format != Format::kNone) {
      const int64_t per_group = p.per_column ? p.scale_stride : 1;
      buffers.push_back(std::make_unique<Buffer>(heads * groups * per_group * sizeof(float)));
      p.scales = reinterpret_cast<float*>(buffers.back()->data());
    }
    prepare_with(p, kernels, pool);
    return {static_cast<const std::byte*>(p.rows), p.scales, p.out_heads, groups, bytes_per_group,
            p.per_column ? p.scale_stride : 1};
  }

  PreparedRows queries(const PermView& perm, float* dots) const {
    const Problem& problem = params.problem;
    PrepareParams p = source(params.q, perm, problem.q_heads, problem.head_dim);
    p.transform = call.q_transform;
    p.factor = call.q_factor;
    p.dot_with = call.mean;
    p.dot_group = problem.q_heads / problem.kv_heads;
    p.dots = dots;
    p.format = call.qk;
    p.row_stride = ceil_to(problem.head_dim, 64);
    // A group longer than all slots means the same as one that just holds them.
    const int64_t rows = std::min(call.q_rows, std::max<int64_t>(p.slots, 1));
    return run(p, rows, rows * p.row_stride);
  }

  PreparedRows keys(const PermView& perm) const {
    const Problem& problem = params.problem;
    PrepareParams p = source(params.k, perm, problem.kv_heads, problem.head_dim);
    p.transform = call.k_transform;
    p.mean = call.mean;
    p.factor = call.k_factor;
    p.format = call.qk;
    p.layout = Layout::kBiasedRows;
    p.row_stride = ceil_to(problem.head_dim, 64);
    return run(p, call.kv_rows, call.kv_rows * p.row_stride);
  }

  PreparedRows values(const PermView& perm) const {
    const Problem& problem = params.problem;
    PrepareParams p = source(params.v, perm, problem.kv_heads, problem.head_dim_v);
    p.format = call.pv;
    p.per_column = true;
    p.scale_stride = ceil_to(problem.head_dim_v, 16);
    if (call.pv == Format::kNone || call.pv == Format::kFp8) {
      p.layout = call.pv == Format::kFp8 ? Layout::kBfloat16Rows : Layout::kRows;
      p.row_stride = problem.head_dim_v;
      const int64_t item = call.pv == Format::kFp8 ? 2 : size_of(problem.dtype);
      return run(p, call.kv_rows, call.kv_rows * p.row_stride * item);
    }
    p.layout = kernels.value_layout;
    p.row_stride = p.scale_stride;
    const int64_t padded = ceil_to(call.kv_rows, p.layout == Layout::kTiles ? 64 : 4);
    return run(p, call.kv_rows, padded * p.row_stride);
  }
};

ValueKind kind_of(Format pv) {
  return pv == Format::kNone  ? ValueKind::kPlain
         : pv == Format::kFp8 ? ValueKind::kFp8
                              : ValueKind::kInteger;
}

}  // namespace

void forward_quantised(const FwdParams& given, const QuantisedCall& call, Isa isa,
                       const Pool& pool) {
  const Problem& problem = given.problem;
  if (problem.batch * problem.q_heads * problem.sq == 0) return;
  Kernels kernels = select_kernels(isa, problem.dtype);
  Buffers buffers;
  const Preparation preparation{given, call, kernels, pool, buffers};
  std::unique_ptr<float[]> dots;
  const int64_t queries = problem.batch * problem.q_heads * problem.sq;
  if (call.mean != nullptr) dots.reset(new float[queries]());

  std::vector<PreparedRows> q, k(problem.num_parts), v(problem.num_parts);
  for (int32_t i = 0; i < problem.num_parts; ++i) {
    const PlanPart& part = problem.parts[i];
    if (static_cast<size_t>(part.group) >= q.size()) {
      q.push_back(preparation.queries(part.q_perm, dots.get()));
    }
    int32_t before = 0;
    const IntView& order = part.kv_perm.token_of_slot;
    while (!same_order(problem.parts[before].kv_perm.token_of_slot, order)) ++before;
    k[i] = before < i ? k[before] : preparation.keys(part.kv_perm);
    v[i] = before < i ? v[before] : preparation.values(part.kv_perm);
  }
  const QuantisedOperands operands{call.pv,  call.q_rows, call.kv_rows,
                                   q.data(), k.data(),    v.data()};
  FwdParams params = given;
  params.quantised = &operands;
  const auto kind = static_cast<int32_t>(kind_of(call.pv));
  kernels.forward = kernels.forward_quantised[kind];
  run_plan(params, kernels, kernels.quantised_scratch[kind](params), pool);
  if (call.mean == nullptr) return;
  // Smoothing took one number from all scores of a query.
  for (int64_t i = 0; i < queries; ++i) params.lse[i] += problem.scale * dots[i];
}

}  // namespace permattn::cpu
