// The CUDA operators of what comes before attention: rows transformed, permuted and quantised, and
// statistics of columns. What statistics need beside their results is allocated here.
#include "../cuda/permute/prepare.h"
#include "cuda_common.h"
#include "prologue.h"

namespace permattn::binding {
namespace {

void check_devices(const Tensor& x, const std::vector<Tensor>& prologue_tensors) {
  for (const Tensor& t : prologue_tensors) check_device(t, x, "prologue");
}

// Token statistics where a norm looks across heads; they live as long as the tensor.
std::optional<Tensor> token_stats_of(PrepareParams& p, const Tensor& x, void* stream) {
  if (!cuda::needs_token_stats(p)) return std::nullopt;
  const std::vector<int64_t> size = {p.batch, p.tokens, 2};
  Tensor stats = torch::stable::new_empty(x, size, ScalarType::Float);
  auto* data = static_cast<float*>(stats.data_ptr());
  const char* why = cuda::launch_token_statistics(p, data, stream);
  STD_TORCH_CHECK(why == nullptr, "cuda_prepare: ", why);
  p.token_stats = data;
  return stats;
}

// Numbers of a row of a layout in memory, and the dtype that holds them.
void add_rows(PrepareParams& p, const Tensor& x, const Tensor& rows) {
  const bool is_nibbles = p.layout == Layout::kNibbleRows;
  const bool is_fragments = p.layout == Layout::kFragments;
  STD_TORCH_CHECK(p.layout == Layout::kRows || is_nibbles || is_fragments,
                  "layout: wants rows, rows of nibbles or fragments");
  STD_TORCH_CHECK(!is_nibbles || (p.format == Format::kInt4 && p.dim % 2 == 0),
                  "layout: rows of nibbles are of INT4 and an even width");
  STD_TORCH_CHECK(!is_fragments || p.format != Format::kNone, "layout: fragments want a format");
  const ScalarType dtype = p.format == Format::kNone  ? x.scalar_type()
                           : p.format == Format::kFp8 ? ScalarType::Float8_e4m3fn
                                                      : ScalarType::Char;
  STD_TORCH_CHECK(rows.dim() == (is_fragments ? 5 : 4) && rows.is_contiguous() &&
                      rows.size(0) == p.batch && rows.scalar_type() == dtype,
                  "rows: wrong dtype or shape");
  check_device(rows, x, "rows");
  check_aligned_pointer(rows, "rows");
  p.out_heads = rows.size(1);
  STD_TORCH_CHECK(p.heads > 0 && p.out_heads % p.heads == 0, "rows: Hp must be a multiple of H");
  p.rows = rows.data_ptr();
  p.row_stride = p.scale_stride = p.dim;
  if (is_fragments) {
    const int64_t bytes =
        p.format == Format::kInt4 ? ceil_div(p.rows_per_scale, 2) : p.rows_per_scale;
    const int64_t groups = ceil_div(p.slots, p.rows_per_scale);
    STD_TORCH_CHECK(rows.size(2) == groups && rows.size(3) == p.dim && rows.size(4) == bytes,
                    "rows: want [B, Hp, ", groups, ", ", p.dim, ", ", bytes, "]");
    p.head_stride = groups * p.dim * bytes;
    return;
  }
  const int64_t width = is_nibbles ? p.dim / 2 : p.dim;
  STD_TORCH_CHECK(rows.size(2) == p.slots && rows.size(3) == width, "rows: want [B, Hp, ", p.slots,
                  ", ", width, "]");
  p.head_stride = p.slots * width * static_cast<int64_t>(rows.element_size());
}

void add_scales(PrepareParams& p, const Tensor& x, const std::optional<Tensor>& scales) {
  if (p.format == Format::kNone) return;
  STD_TORCH_CHECK(scales.has_value(), "scales: wanted beside quantised rows");
  const int64_t groups = ceil_div(p.slots, p.rows_per_scale);
  const int64_t numbers = p.batch * p.out_heads * groups * (p.per_column ? p.dim : 1);
  p.scales = flat_floats_of(*scales, x, "scales", numbers);
}

// dots [B, H, S] of the transformed rows with against [B, H / n, D].
void add_dots(PrepareParams& p, const Tensor& x, const std::optional<Tensor>& against,
              const std::optional<Tensor>& dots) {
  STD_TORCH_CHECK(against.has_value() == dots.has_value(), "against, dots: want both or none");
  if (!dots.has_value()) return;
  const int64_t per_head = p.batch * p.dim;
  const int64_t heads = per_head == 0 ? p.heads : against->numel() / per_head;
  STD_TORCH_CHECK(heads >= 1 && p.heads % heads == 0 && p.out_heads == p.heads,
                  "against: wants heads that divide those of x, of as many orders");
  p.dot_group = p.heads / heads;
  p.dot_with = flat_floats_of(*against, x, "against", per_head * heads);
  p.dots = flat_floats_of(*dots, x, "dots", p.batch * p.heads * p.tokens);
}

// See cpu_prepare; `layout` is a number of the Layout enum.
void cuda_prepare(const Tensor& x, std::optional<Tensor> token_of_slot,
                  std::vector<Tensor> prologue_tensors, std::vector<int64_t> prologue_ints,
                  std::vector<double> prologue_floats, std::optional<Tensor> mean,
                  std::optional<Tensor> factor, std::optional<Tensor> against,
                  std::optional<Tensor> dots, int64_t format, int64_t rows_per_scale,
                  bool per_column, int64_t layout, const Tensor& rows,
                  std::optional<Tensor> scales) {
  STD_TORCH_CHECK(x.dim() == 4, "x: wants 4 axes, got ", x.dim());
  check_devices(x, prologue_tensors);
  PrepareParams p = source_of(x, prologue_tensors, prologue_ints, prologue_floats);
  p.format = format_of(format, "format");
  STD_TORCH_CHECK(rows_per_scale >= 1 && rows_per_scale <= cuda::kMaxRowsPerScale,
                  "rows_per_scale: wants 1 to ", cuda::kMaxRowsPerScale, ", got ", rows_per_scale);
  STD_TORCH_CHECK(layout >= 0 && layout <= static_cast<int64_t>(Layout::kFragments),
                  "layout: no layout of number ", layout);
  p.rows_per_scale = rows_per_scale;
  p.per_column = per_column;
  p.layout = static_cast<Layout>(layout);
  p.slots = narrow(p.tokens, 0, "S");
  if (token_of_slot.has_value()) {
    check_device(*token_of_slot, x, "token_of_slot");
    STD_TORCH_CHECK(token_of_slot->dim() == 3, "token_of_slot: wants int32 [Bx, Hx, n]");
    p.slots = narrow(token_of_slot->size(2), 0, "token_of_slot");
  }
  p.padded_slots = p.slots;
  add_rows(p, x, rows);
  if (token_of_slot.has_value()) {
    p.token_of_slot = int_view_of(*token_of_slot, p.batch, p.out_heads, "token_of_slot");
  }
  const int64_t places = p.batch * p.heads * p.dim;
  p.mean = optional_flat_floats_of(mean, x, "mean", places);
  p.factor = optional_flat_floats_of(factor, x, "factor", places);
  add_dots(p, x, against, dots);
  add_scales(p, x, scales);
  if (p.batch * p.out_heads * p.slots == 0) return;
  const Launcher launcher(x);
  const std::optional<Tensor> stats = token_stats_of(p, x, launcher.stream());
  const char* why = cuda::launch_prepare(p, 0, launcher.stream());
  STD_TORCH_CHECK(why == nullptr, "cuda_prepare: ", why, " (format ", name_of(p.format),
                  ", head dim ", p.dim, ", ", p.rows_per_scale, " rows a scale)");
}

// See cpu_column_statistics.
void cuda_column_statistics(const Tensor& x, std::vector<Tensor> prologue_tensors,
                            std::vector<int64_t> prologue_ints, std::vector<double> prologue_floats,
                            std::optional<Tensor> seen, const Tensor& sum, const Tensor& lowest,
                            const Tensor& highest) {
  STD_TORCH_CHECK(x.dim() == 4, "x: wants 4 axes, got ", x.dim());
  check_devices(x, prologue_tensors);
  ColumnParams c{};
  c.source = source_of(x, prologue_tensors, prologue_ints, prologue_floats);
  PrepareParams& p = c.source;
  narrow(p.tokens, 0, "S");
  if (seen.has_value()) check_device(*seen, x, "seen");
  add_seen(c, seen);
  const int64_t places = p.batch * p.heads * p.dim;
  c.sum = flat_floats_of(sum, x, "sum", places);
  c.lowest = flat_floats_of(lowest, x, "lowest", places);
  c.highest = flat_floats_of(highest, x, "highest", places);
  if (places == 0) return;
  const Launcher launcher(x);
  const std::optional<Tensor> stats = token_stats_of(p, x, launcher.stream());
  const std::vector<int64_t> size = {cuda::column_scratch(c)};
  Tensor scratch = torch::stable::new_empty(x, size, ScalarType::Float);
  const char* why =
      cuda::launch_column_statistics(c, static_cast<float*>(scratch.data_ptr()), launcher.stream());
  STD_TORCH_CHECK(why == nullptr, "cuda_column_statistics: ", why);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(permattn_native, PERMATTN_CUDA_KEY, m) {
  m.impl("cuda_prepare", TORCH_BOX(&cuda_prepare));
  m.impl("cuda_column_statistics", TORCH_BOX(&cuda_column_statistics));
}

}  // namespace permattn::binding
