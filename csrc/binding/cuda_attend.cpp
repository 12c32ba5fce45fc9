// The CUDA operators of attention: one launch each. A plan's values lie on the device, where the
// kernels look at them; what is checked here are shapes, types and places.
#include "../cuda/attend.h"
#include "../cuda/index/index.h"
#include "cuda_common.h"

namespace permattn::binding {
namespace {

using cuda::AttentionArgs;
using cuda::Config;
using cuda::PartArgs;
using cuda::Shape;

// backends/cuda/launch.py packs them.
constexpr size_t kAttendHeader = 10;
constexpr size_t kIntsPerAttendPart = 9;
constexpr size_t kTensorsPerAttendPart = 8;
constexpr float kLog2E = 1.4426950408889634F;

struct Header {
  Format qk, pv;
  int64_t q_rows, kv_rows, sq, skv, unit, capability, head_dim;
  bool sorts;  // the longest rows go first, where no order is given
};

Header header_of(const std::vector<int64_t>& n) {
  return {format_of(n[0], "qk"),
          format_of(n[1], "pv"),
          n[2],
          n[3],
          n[4],
          n[5],
          n[6],
          n[7],
          n[8],
          n[9] != 0};
}

// An empty list stands for a tensor that is not there.
bool is_there(const Tensor& x) { return x.dim() != 1 || x.numel() != 0; }

int64_t number_bytes(int64_t numbers, Format format) {
  return format == Format::kInt4 ? ceil_div(numbers, 2) : numbers;
}

ScalarType byte_dtype(Format format) {
  return format == Format::kFp8 ? ScalarType::Float8_e4m3fn : ScalarType::Char;
}

// Facts on which the kernel is chosen, of parts whose numbers are checked.
Shape shape_of(const Header& header, const std::vector<int64_t>& ints, size_t num_parts,
               Dtype dtype, int64_t head_dim_v) {
  Shape shape{};
  shape.capability = narrow(header.capability, 0, "capability");
  shape.dtype = dtype;
  shape.qk = header.qk;
  shape.pv = header.pv;
  shape.head_dim = narrow(header.head_dim, 1, "head_dim");
  shape.head_dim_v = narrow(head_dim_v, 1, "head_dim_v");
  shape.unit = narrow(header.unit, 1, "unit");
  shape.q_rows = narrow(header.q_rows, 0, "q_rows");
  shape.kv_rows = narrow(header.kv_rows, 0, "kv_rows");
  int64_t block_kv = 0;
  for (size_t i = 0; i < num_parts; ++i) {
    block_kv = std::gcd(block_kv, ints[kAttendHeader + i * kIntsPerAttendPart + 1]);
  }
  shape.block_kv = narrow(block_kv, 1, "block_kv");
  return shape;
}

void add_keys(PartArgs& part, const Tensor* t, const Tensor& q, const AttentionArgs& args,
              const Config& config) {
  const Tensor &k = t[0], &v = t[1];
  const bool quantised_qk = config.qk != Format::kNone, quantised_pv = config.pv != Format::kNone;
  const int64_t groups = args.kv_rows > 0 ? ceil_div(part.num_slots, args.kv_rows) : 0;
  STD_TORCH_CHECK(k.dim() == 4 && k.size(1) > 0 && args.q_heads % k.size(1) == 0,
                  "k: wants [B, H, rows, D] with heads that divide q's");
  STD_TORCH_CHECK(!quantised_qk || part.k_in_slots, "k: quantised rows are slots");
  part.k_heads = static_cast<int32_t>(k.size(1));
  STD_TORCH_CHECK(k.scalar_type() == (quantised_qk ? ScalarType::Char : q.scalar_type()),
                  "k: wrong dtype");
  part.k = aligned_view_of(k, q, "k", args.batch, part.k_heads,
                           part.k_in_slots ? part.num_slots : args.num_kv_tokens,
                           number_bytes(args.head_dim, config.qk));
  if (quantised_qk) {
    STD_TORCH_CHECK(is_there(t[2]), "k_scale: wanted beside quantised keys");
    part.k_scale = flat_floats_of(t[2], q, "k_scale", args.batch * part.k_heads * groups);
  }
  STD_TORCH_CHECK(v.dim() >= 4 && v.size(1) > 0 && args.q_heads % v.size(1) == 0,
                  "v: wants [B, H, ...] with heads that divide q's");
  part.v_heads = static_cast<int32_t>(v.size(1));
  if (!quantised_pv) {
    const ScalarType dtype =
        args.out_dtype == Dtype::kBFloat16 ? ScalarType::BFloat16 : ScalarType::Half;
    STD_TORCH_CHECK(v.scalar_type() == dtype, "v: wants out's dtype");
    part.v =
        aligned_view_of(v, q, "v", args.batch, part.v_heads,
                        part.v_in_slots ? part.num_slots : args.num_kv_tokens, args.head_dim_v);
    return;
  }
  const int64_t columns = args.batch * part.v_heads * groups * args.head_dim_v;
  part.v_tiles = flat_data_of(v, q, "v", byte_dtype(config.pv),
                              columns * number_bytes(args.kv_rows, config.pv));
  STD_TORCH_CHECK(is_there(t[3]), "v_scale: wanted beside quantised values");
  part.v_scale = flat_floats_of(t[3], q, "v_scale", columns);
}

PartArgs part_of(const Tensor* t, const int64_t* n, const Tensor& q, const AttentionArgs& args,
                 const Config& config) {
  PartArgs part{};
  const bool is_identity = n[6] != 0;
  part.k_in_slots = n[7] != 0;
  part.v_in_slots = n[8] != 0;
  part.num_slots = args.num_kv_tokens;
  if (!is_identity) {
    STD_TORCH_CHECK(is_there(t[4]), "kv_token: wanted where slots are not tokens");
    part.kv_token = device_ints_of(t[4], q, args.batch, args.q_heads, "kv_token");
    part.num_slots = narrow(part.kv_token.size, 0, "kv_token");
  }
  // Of a block longer than all slots there is one: as long as they are, in whole scales and tiles.
  const int64_t step = std::lcm<int64_t>(std::max(args.kv_rows, 1), 64);
  const int64_t longest = std::max<int64_t>(ceil_div(part.num_slots, step), 1) * step;
  STD_TORCH_CHECK(n[0] >= 1 && n[1] >= 1, "block_q, block_kv: must be >= 1, got ", n[0], ", ",
                  n[1]);
  part.block_q = static_cast<int32_t>(std::min<int64_t>(n[0], INT32_MAX));
  part.block_kv = narrow(std::min(n[1], longest), 1, "block_kv");
  if (config.qk != Format::kNone) {
    STD_TORCH_CHECK(part.block_kv % args.kv_rows == 0, "kv_rows: must divide blocks of ",
                    part.block_kv, ", got ", args.kv_rows);
  }
  part.kv_indices = device_ints_of(t[5], q, args.batch, args.q_heads, "kv_indices");
  part.row_offsets = device_ints_of(t[6], q, args.batch, args.q_heads, "row_offsets");
  part.num_full = device_ints_of(t[7], q, args.batch, args.q_heads, "num_full");
  narrow(part.kv_indices.size, 0, "kv_indices");
  const int64_t rows = part.num_full.size;
  STD_TORCH_CHECK(part.row_offsets.size == rows + 1,
                  "row_offsets: wants one column more than num_full, got ", part.row_offsets.size,
                  " and ", rows);
  STD_TORCH_CHECK(rows >= ceil_div(args.num_q_slots, n[0]), "num_full: wants a column for each of ",
                  ceil_div(args.num_q_slots, n[0]), " blocks, got ", rows);
  const Band band = band_of(n[2] != 0, n[3], n[4] != 0, n[5]);
  part.band = lanes_are_queries(band);
  part.has_band = n[2] != 0 || n[4] != 0;
  part.two_bounds = n[2] != 0 && n[4] != 0;
  add_keys(part, t, q, args, config);
  return part;
}

// q, its scales and its order.
void add_queries(AttentionArgs& args, const Tensor& q, const std::optional<Tensor>& q_scale,
                 const std::optional<Tensor>& q_token, const Config& config) {
  args.num_q_slots = args.num_q_tokens;
  if (q_token.has_value()) {
    args.q_token = device_ints_of(*q_token, q, args.batch, args.q_heads, "q_token");
    args.num_q_slots = narrow(args.q_token.size, 0, "q_token");
  }
  const bool quantised = config.qk != Format::kNone;
  STD_TORCH_CHECK(!quantised || (args.q_rows >= 1 && args.kv_rows >= 1),
                  "q_rows, kv_rows: must be >= 1, got ", args.q_rows, ", ", args.kv_rows);
  if (quantised) STD_TORCH_CHECK(q.scalar_type() == ScalarType::Char, "q: wants int8");
  const int64_t rows = quantised ? args.num_q_slots : args.num_q_tokens;
  args.q = aligned_view_of(q, q, "q", args.batch, args.q_heads, rows,
                           number_bytes(args.head_dim, config.qk));
  if (!quantised) return;
  STD_TORCH_CHECK(q_scale.has_value(), "q_scale: wanted beside quantised queries");
  const int64_t groups = ceil_div(args.num_q_slots, args.q_rows);
  args.q_scale = flat_floats_of(*q_scale, q, "q_scale",
                                static_cast<int64_t>(args.batch) * args.q_heads * groups);
}

void add_results(AttentionArgs& args, const Tensor& q, const Tensor& out, const Tensor& lse,
                 const std::optional<Tensor>& acc, const std::optional<Tensor>& high,
                 const std::optional<Tensor>& total) {
  args.out =
      aligned_view_of(out, q, "out", args.batch, args.q_heads, args.num_q_tokens, args.head_dim_v);
  const int64_t rows = static_cast<int64_t>(args.batch) * args.q_heads * args.num_q_tokens;
  args.lse = flat_floats_of(lse, q, "lse", rows);
  STD_TORCH_CHECK(acc.has_value() == high.has_value() && acc.has_value() == total.has_value(),
                  "acc, high, total: want all three or none");
  args.acc = optional_flat_floats_of(acc, q, "acc", rows * args.head_dim_v);
  args.high = optional_flat_floats_of(high, q, "high", rows);
  args.total = optional_flat_floats_of(total, q, "total", rows);
}

int64_t items_of(const AttentionArgs& args) {
  return static_cast<int64_t>(args.batch) * args.q_heads * items_per_head(args);
}

void add_tiles(AttentionArgs& args, const Tensor& q, const std::optional<Tensor>& order,
               const Config& config) {
  args.tiles_per_unit = static_cast<int32_t>(ceil_div(args.unit, config.block_m));
  const int64_t tiles = ceil_div(args.num_q_slots, args.unit) * args.tiles_per_unit;
  const int64_t blocks = static_cast<int64_t>(args.batch) * args.q_heads * tiles;
  narrow(blocks, 0, "tiles of all heads");
  args.num_tiles = static_cast<int32_t>(tiles);
  args.tiles_per_item = cuda::tiles_per_item(config);
  if (!order.has_value()) return;
  args.order = static_cast<const int32_t*>(
      flat_data_of(*order, q, "order", ScalarType::Int, items_of(args)));
}

Dtype half_dtype_of(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "out: wants bfloat16 or float16");
  return dtype == ScalarType::BFloat16 ? Dtype::kBFloat16 : Dtype::kFloat16;
}

const char* launch(const AttentionArgs& args, const Config& config, void* stream) {
  if (config.family == cuda::Family::kSm80) return sm80::launch_attend(args, config, stream);
#if defined(PERMATTN_CUDA_SM90) || defined(PERMATTN_CUDA_SHIM)
  return sm90::launch_attend(args, config, stream);
#else
  return "this library holds no code for compute capability 9.0a";
#endif
}

void raise(const char* why, const Config& c) {
  STD_TORCH_CHECK(why == nullptr, "cuda_attend: ", why, " (sm",
                  c.family == cuda::Family::kSm80 ? 80 : 90, " kernel, head dim ", c.dim, ", tile ",
                  c.block_m, " x ", c.block_n, ", ", c.warps, " warps, ", c.stages,
                  " stages, qk = ", name_of(c.qk), ", pv = ", name_of(c.pv), ")");
}

// Fills `order` on the device; both tensors may go once that is launched, as memory is reused in
// the order of the stream.
const char* sort_rows(AttentionArgs& args, const Tensor& q, Tensor& order, void* stream) {
  const auto words = [&](int64_t count) {
    const std::vector<int64_t> size = {count};
    return torch::stable::new_empty(q, size, ScalarType::Int);
  };
  order = words(items_of(args));
  Tensor scratch = words(cuda::order_scratch(args));
  auto* made = static_cast<int32_t*>(order.data_ptr());
  args.order = made;
  return cuda::launch_order(args, made, static_cast<uint32_t*>(scratch.data_ptr()), stream);
}

void cuda_attend(const Tensor& q, std::optional<Tensor> q_scale, std::optional<Tensor> q_token,
                 std::vector<Tensor> part_tensors, const Tensor& out, const Tensor& lse,
                 std::optional<Tensor> acc, std::optional<Tensor> high, std::optional<Tensor> total,
                 std::optional<Tensor> order, std::vector<int64_t> ints, double scale) {
  const size_t num_parts = part_tensors.size() / kTensorsPerAttendPart;
  STD_TORCH_CHECK(num_parts >= 1 && num_parts <= cuda::kMaxParts &&
                      part_tensors.size() == num_parts * kTensorsPerAttendPart &&
                      ints.size() == kAttendHeader + num_parts * kIntsPerAttendPart,
                  "cuda_attend: wants 1 to 4 parts of 8 tensors and 9 integers after 10 integers, "
                  "got ",
                  part_tensors.size(), " tensors and ", ints.size(), " integers");
  STD_TORCH_CHECK(q.dim() == 4 && out.dim() == 4, "q, out: want 4 axes");
  const Header header = header_of(ints);
  AttentionArgs args{};
  args.out_dtype = half_dtype_of(out);
  const Shape shape = shape_of(header, ints, num_parts, args.out_dtype, out.size(3));
  const char* why_not = cuda::why_not(shape);
  STD_TORCH_CHECK(why_not == nullptr, "cuda_attend: ", why_not);
  const Config config = cuda::select_config(shape);
  if (config.qk == Format::kNone) {
    STD_TORCH_CHECK(q.scalar_type() == out.scalar_type(), "out: wants q's dtype");
  }

  args.batch = narrow(q.size(0), 0, "B");
  args.q_heads = narrow(q.size(1), 1, "Hq");
  args.num_q_tokens = narrow(header.sq, 0, "Sq");
  args.num_kv_tokens = narrow(header.skv, 0, "Skv");
  args.head_dim = shape.head_dim;
  args.head_dim_v = shape.head_dim_v;
  args.scale_log2 = static_cast<float>(scale) * kLog2E;
  args.q_rows = shape.q_rows;
  args.kv_rows = shape.kv_rows;
  args.unit = shape.unit;
  add_queries(args, q, q_scale, q_token, config);
  add_results(args, q, out, lse, acc, high, total);
  add_tiles(args, q, order, config);
  args.num_parts = static_cast<int32_t>(num_parts);
  for (size_t i = 0; i < num_parts; ++i) {
    const int64_t* n = &ints[kAttendHeader + i * kIntsPerAttendPart];
    args.parts[i] = part_of(&part_tensors[i * kTensorsPerAttendPart], n, q, args, config);
    STD_TORCH_CHECK(n[0] % args.unit == 0 || args.unit >= args.num_q_slots,
                    "unit: must divide blocks of ", n[0], ", got ", args.unit);
  }
  if (items_of(args) == 0) return;
  const Launcher launcher(q);
  Tensor sorted;
  if (header.sorts && !order.has_value()) {
    raise(sort_rows(args, q, sorted, launcher.stream()), config);
  }
  raise(launch(args, config, launcher.stream()), config);
}

void cuda_finish(const Tensor& acc, const Tensor& high, const Tensor& total, const Tensor& out,
                 const Tensor& lse) {
  cuda::FinishArgs args{};
  STD_TORCH_CHECK(out.dim() == 4, "out: wants 4 axes, got ", out.dim());
  args.out_dtype = half_dtype_of(out);
  args.q_heads = narrow(out.size(1), 0, "Hq");
  args.num_q_tokens = narrow(out.size(2), 0, "Sq");
  args.head_dim_v = narrow(out.size(3), 1, "Dv");
  args.rows = out.size(0) * out.size(1) * out.size(2);
  STD_TORCH_CHECK(args.head_dim_v % 8 == 0, "Dv: wants a multiple of 8, got ", args.head_dim_v);
  args.out = aligned_view_of(out, acc, "out", out.size(0), out.size(1), out.size(2), out.size(3));
  args.acc = flat_floats_of(acc, acc, "acc", args.rows * args.head_dim_v);
  args.high = flat_floats_of(high, acc, "high", args.rows);
  args.total = flat_floats_of(total, acc, "total", args.rows);
  args.lse = flat_floats_of(lse, acc, "lse", args.rows);
  if (args.rows == 0) return;
  const Launcher launcher(acc);
  const char* why = cuda::launch_finish(args, launcher.stream());
  STD_TORCH_CHECK(why == nullptr, "cuda_finish: ", why);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(permattn_native, PERMATTN_CUDA_KEY, m) {
  m.impl("cuda_attend", TORCH_BOX(&cuda_attend));
  m.impl("cuda_finish", TORCH_BOX(&cuda_finish));
}

}  // namespace permattn::binding
