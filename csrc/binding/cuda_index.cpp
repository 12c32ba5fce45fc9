// The CUDA operators of lists of blocks. Results are the caller's; only scratch is allocated here.
#include "../cuda/index/index.h"

#include "cuda_common.h"
#include "probe.h"

namespace permattn::binding {
namespace {

void raise(const char* why, const char* name) { STD_TORCH_CHECK(why == nullptr, name, ": ", why); }

int64_t heads_of(const Tensor& x, int64_t axes, const char* name) {
  STD_TORCH_CHECK(x.dim() == axes, name, ": wants ", axes, " axes, got ", x.dim());
  return x.size(0) * x.size(1);
}

int32_t* flat_ints_of(const Tensor& x, const Tensor& like, const char* name, int64_t numbers) {
  return static_cast<int32_t*>(flat_data_of(x, like, name, ScalarType::Int, numbers));
}

// Rows of lists that are written.
cuda::Lists lists_of(const Tensor& like, int64_t heads, int64_t rows, const Tensor& indices,
                     const Tensor& row_offsets, const Tensor& num_full) {
  STD_TORCH_CHECK(indices.dim() == 3, "indices: wants int32 [Bx, Hx, capacity]");
  const int64_t capacity = narrow(indices.size(2), 0, "capacity");
  return {flat_ints_of(indices, like, "indices", heads * capacity),
          flat_ints_of(row_offsets, like, "row_offsets", heads * (rows + 1)),
          flat_ints_of(num_full, like, "num_full", heads * rows), capacity};
}

// mask is bool [Bx, Hx, nQ, nKV]; see core.block_index.BlockIndex.from_block_mask.
void cuda_compact(const Tensor& mask, bool all_full, const Tensor& indices,
                  const Tensor& row_offsets, const Tensor& num_full) {
  cuda::CompactParams p{};
  p.heads = heads_of(mask, 4, "mask");
  p.rows = narrow(mask.size(2), 0, "nQ");
  p.columns = narrow(mask.size(3), 0, "nKV");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_contiguous(),
                  "mask: wants contiguous bool [Bx, Hx, nQ, nKV]");
  p.mask = static_cast<const uint8_t*>(mask.data_ptr());
  p.all_full = all_full;
  p.lists = lists_of(mask, p.heads, p.rows, indices, row_offsets, num_full);
  if (p.heads == 0) return;
  const Launcher launcher(mask);
  raise(cuda::launch_compact(p, launcher.stream()), "cuda_compact");
}

// The first three are a BlockIndex's, the others its transpose's.
void cuda_transpose(const Tensor& kv_indices, const Tensor& row_offsets, const Tensor& kv_num_full,
                    const Tensor& q_indices, const Tensor& key_offsets, const Tensor& q_num_full) {
  cuda::TransposeParams p{};
  p.heads = heads_of(kv_num_full, 3, "kv_num_full");
  p.rows = narrow(kv_num_full.size(2), 1, "nQ");
  STD_TORCH_CHECK(heads_of(q_num_full, 3, "q_num_full") == p.heads, "q_num_full: wrong shape");
  p.columns = narrow(q_num_full.size(2), 0, "nKV");
  const cuda::Lists from =
      lists_of(kv_indices, p.heads, p.rows, kv_indices, row_offsets, kv_num_full);
  p.indices = from.indices;
  p.row_offsets = from.row_offsets;
  p.num_full = from.num_full;
  p.lists = lists_of(kv_indices, p.heads, p.columns, q_indices, key_offsets, q_num_full);
  STD_TORCH_CHECK(p.lists.capacity == from.capacity, "q_indices: wants as many entries");
  if (p.heads == 0) return;
  const Launcher launcher(kv_indices);
  const std::vector<int64_t> size = {cuda::transpose_scratch(p)};
  Tensor scratch = torch::stable::new_empty(kv_indices, size, ScalarType::Int);
  p.scratch = static_cast<uint32_t*>(scratch.data_ptr());
  raise(cuda::launch_transpose(p, launcher.stream()), "cuda_transpose");
}

constexpr size_t kOrderHeader = 6;
constexpr size_t kOrderIntsPerPart = 3;

// `row_offsets` of every part; ints: B, Hq, tiles of a head, tiles of a unit, tiles of an item,
// unit, and by part block_q, block_kv, slots of keys. `order` is what cuda_attend takes.
void cuda_order(std::vector<Tensor> row_offsets, std::vector<int64_t> ints, const Tensor& order) {
  const size_t num_parts = row_offsets.size();
  STD_TORCH_CHECK(num_parts >= 1 && num_parts <= cuda::kMaxParts &&
                      ints.size() == kOrderHeader + num_parts * kOrderIntsPerPart,
                  "cuda_order: wants 1 to 4 parts of 3 integers after 6 integers");
  cuda::AttentionArgs args{};
  args.batch = narrow(ints[0], 0, "B");
  args.q_heads = narrow(ints[1], 0, "Hq");
  args.num_tiles = narrow(ints[2], 0, "tiles");
  args.tiles_per_unit = narrow(ints[3], 1, "tiles of a unit");
  args.tiles_per_item = narrow(ints[4], 1, "tiles of an item");
  STD_TORCH_CHECK(args.tiles_per_item <= 2, "tiles of an item: wants 1 or 2, got ", ints[4]);
  args.unit = narrow(ints[5], 1, "unit");
  args.num_parts = static_cast<int32_t>(num_parts);
  // The first slot of the last unit.
  const int64_t last = static_cast<int64_t>((args.num_tiles - 1) / args.tiles_per_unit) * args.unit;
  for (size_t i = 0; i < num_parts; ++i) {
    const int64_t* n = &ints[kOrderHeader + i * kOrderIntsPerPart];
    cuda::PartArgs& part = args.parts[i];
    part.row_offsets =
        device_ints_of(row_offsets[i], order, args.batch, args.q_heads, "row_offsets");
    part.block_q = narrow(n[0], 1, "block_q");
    part.block_kv = narrow(n[1], 1, "block_kv");
    part.num_slots = narrow(n[2], 0, "slots");
    STD_TORCH_CHECK(args.num_tiles == 0 || last / part.block_q + 1 < part.row_offsets.size,
                    "row_offsets: too few rows for the tiles");
  }
  const int64_t count = cuda::order_scratch(args) / 3;
  auto* to = flat_ints_of(order, order, "order", count);
  if (count == 0) return;
  const Launcher launcher(order);
  const std::vector<int64_t> size = {cuda::order_scratch(args)};
  Tensor scratch = torch::stable::new_empty(order, size, ScalarType::Int);
  raise(cuda::launch_order(args, to, static_cast<uint32_t*>(scratch.data_ptr()), launcher.stream()),
        "cuda_order");
}

// means is float32 [B, H, ceil(slots / block), D]; see core.selection.pooled_blocks.
void cuda_pool(const Tensor& x, std::optional<Tensor> token_of_slot, int64_t block,
               const Tensor& means) {
  cuda::PoolParams p{};
  p.x = view_of(x, "x");
  p.dtype = dtype_of(x);
  p.batch = x.size(0);
  p.heads = x.size(1);
  p.tokens = p.slots = narrow(x.size(2), 0, "S");
  STD_TORCH_CHECK(x.size(3) >= 1 && x.size(3) <= 256, "x: wants 1 to 256 columns, got ", x.size(3));
  p.dim = static_cast<int32_t>(x.size(3));
  p.block = narrow(block, 1, "block");
  if (token_of_slot.has_value()) {
    p.token_of_slot = device_ints_of(*token_of_slot, x, p.batch, p.heads, "token_of_slot");
    p.slots = narrow(p.token_of_slot.size, 0, "token_of_slot");
  }
  const int64_t numbers = p.batch * p.heads * ceil_div(p.slots, p.block) * p.dim;
  p.means = flat_floats_of(means, x, "means", numbers);
  if (numbers == 0) return;
  const Launcher launcher(x);
  raise(cuda::launch_pool(p, launcher.stream()), "cuda_pool");
}

// scale * q k^T: q float32 [B, Hq, nQ, D], k [B, Hkv, nKV, D], scores [B, Hq, nQ, nKV].
void cuda_scores(const Tensor& q, const Tensor& k, double scale, const Tensor& scores) {
  heads_of(q, 4, "q");
  heads_of(k, 4, "k");
  cuda::ScoreParams p{};
  p.batch = q.size(0);
  p.q_heads = q.size(1);
  p.k_heads = k.size(1);
  p.rows = q.size(2);
  p.columns = k.size(2);
  p.dim = narrow(q.size(3), 1, "D");
  STD_TORCH_CHECK(
      k.size(0) == p.batch && k.size(3) == p.dim && p.k_heads >= 1 && p.q_heads % p.k_heads == 0,
      "k: does not fit q");
  p.scale = static_cast<float>(scale);
  p.q = flat_floats_of(q, q, "q", q.numel());
  p.k = flat_floats_of(k, q, "k", k.numel());
  p.scores = flat_floats_of(scores, q, "scores", p.batch * p.q_heads * p.rows * p.columns);
  if (scores.numel() == 0) return;
  const Launcher launcher(q);
  raise(cuda::launch_scores(p, launcher.stream()), "cuda_scores");
}

// scores is float32 [B, Hq, nQ, nKV], stop int32 [nQ] or [B, Hq, nQ], budget int32 [Hq], chosen
// int32 [B, Hq, nQ, n]; see core.selection.strongest_of.
void cuda_strongest(const Tensor& scores, std::optional<Tensor> stop, std::optional<Tensor> budget,
                    const Tensor& chosen) {
  cuda::StrongestParams p{};
  p.heads = heads_of(scores, 4, "scores");
  p.q_heads = scores.size(1);
  p.rows = scores.size(2);
  p.columns = scores.size(3);
  p.scores = flat_floats_of(scores, scores, "scores", scores.numel());
  if (stop.has_value()) {
    const bool is_shared = stop->dim() == 1;
    p.stop = flat_ints_of(*stop, scores, "stop", is_shared ? p.rows : p.heads * p.rows);
    p.stop_stride = is_shared ? 0 : p.rows;
  }
  if (budget.has_value()) p.budget = flat_ints_of(*budget, scores, "budget", p.q_heads);
  STD_TORCH_CHECK(chosen.dim() == 4, "chosen: wants int32 [B, Hq, nQ, n]");
  p.count = narrow(chosen.size(3), 0, "n");
  p.chosen = flat_ints_of(chosen, scores, "chosen", p.heads * p.rows * p.count);
  if (chosen.numel() == 0) return;
  const Launcher launcher(scores);
  raise(cuda::launch_strongest(p, launcher.stream()), "cuda_strongest");
}

// q holds some of `all_rows` rows; diagonal is zeros on entry.
void cuda_probe(const Tensor& q, const Tensor& k, const Tensor& first_position,
                const Tensor& first_coordinate, const Tensor& key_range,
                std::optional<Tensor> order, std::optional<Tensor> skip, bool lse_is_given,
                int64_t all_rows, const Tensor& lse, const Tensor& column, const Tensor& square,
                const Tensor& diagonal) {
  const ProbeTensors x{q,         k,      first_position, first_coordinate,
                       key_range, order,  skip,           lse_is_given,
                       lse,       column, square,         diagonal};
  ProbeParams p = probe_params_of(x, cuda::kMostProbeRows);
  STD_TORCH_CHECK(all_rows >= p.rows, "all_rows: wants at least ", p.rows, ", got ", all_rows);
  p.q = aligned_view_of(q, q, "q", p.batch, p.q_heads, p.rows, p.head_dim);
  p.k = aligned_view_of(k, q, "k", p.batch, p.kv_heads, p.skv, p.head_dim);
  for (const Tensor* at : {&first_position, &first_coordinate, &key_range}) {
    check_device(*at, q, "first_position, first_coordinate, key_range");
  }
  for (const std::optional<Tensor>* at : {&order, &skip}) {
    if (at->has_value()) check_device(**at, q, "order, skip");
  }
  for (const Tensor* at : {&lse, &column, &square, &diagonal}) check_device(*at, q, "results");
  if (p.batch * p.q_heads == 0) return;
  const Launcher launcher(q);
  const std::vector<int64_t> size = {cuda::probe_scratch(p)};
  Tensor scratch = torch::stable::new_empty(lse, size, ScalarType::Float);
  raise(cuda::launch_probe(p, all_rows, static_cast<float*>(scratch.data_ptr()), launcher.stream()),
        "cuda_probe");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(permattn_native, PERMATTN_CUDA_KEY, m) {
  m.impl("cuda_compact", TORCH_BOX(&cuda_compact));
  m.impl("cuda_transpose", TORCH_BOX(&cuda_transpose));
  m.impl("cuda_probe", TORCH_BOX(&cuda_probe));
  m.impl("cuda_order", TORCH_BOX(&cuda_order));
  m.impl("cuda_pool", TORCH_BOX(&cuda_pool));
  m.impl("cuda_scores", TORCH_BOX(&cuda_scores));
  m.impl("cuda_strongest", TORCH_BOX(&cuda_strongest));
}

}  // namespace permattn::binding
