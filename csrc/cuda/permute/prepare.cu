// From PrepareParams to a launch: what fits, how it is shared out, and which loads may be wide.
#include "prepare.h"

#include "launch_rows.h"

namespace permattn::cuda {
namespace {

bool has_whole_columns(const PrepareParams& p) {
  return p.dim % kChunk == 0 && is_aligned(p.mean, 16) && is_aligned(p.factor, 16) &&
         is_aligned(p.dot_with, 16) && is_aligned(p.transform.weight, 16) &&
         is_aligned(p.transform.bias, 16);
}

bool has_whole_angles(const Transform& t) {
  return t.rope_width % (t.interleaved ? kChunk / 2 : kChunk) == 0 && is_aligned(t.cos, 16) &&
         is_aligned(t.sin, 16);
}

WholeLoads whole_loads(const PrepareParams& p) {
  return {has_whole_chunks(p), has_whole_columns(p), has_whole_angles(p.transform)};
}

// A chunk is written by one store.
bool has_whole_rows(const PrepareParams& p) {
  if (p.layout == Layout::kFragments) return true;
  const int64_t bytes = p.layout == Layout::kNibbleRows ? kChunk / 2
                        : p.format != Format::kNone     ? kChunk
                                                        : 16;
  const int64_t row_bytes = p.layout == Layout::kNibbleRows ? p.row_stride / 2
                            : p.format != Format::kNone     ? p.row_stride
                            : p.dtype == Dtype::kFloat32    ? 4 * p.row_stride
                                                            : 2 * p.row_stride;
  return p.dim % kChunk == 0 && is_aligned(p.rows, bytes) && p.head_stride % bytes == 0 &&
         row_bytes % bytes == 0;
}

const char* why_no_source(const PrepareParams& p) {
  if (p.dim < 1 || p.dim > 256) return "prepare: wants 1 to 256 columns";
  if (p.tokens > INT32_MAX || p.slots > INT32_MAX) return "prepare: wants fewer than 2^31 tokens";
  if (p.transform.norm != Transform::Norm::kNone && p.transform.eps < 0.0F) {
    return "prepare: wants eps >= 0";
  }
  return nullptr;
}

const char* why_not(const PrepareParams& p) {
  if (const char* why = why_no_source(p)) return why;
  if (needs_token_stats(p) && p.token_stats == nullptr) return "prepare: wants token_stats";
  const bool is_integer = p.format == Format::kInt8 || p.format == Format::kInt4;
  switch (p.layout) {
    case Layout::kRows:
      break;
    case Layout::kNibbleRows:
      if (p.format != Format::kInt4) return "prepare: nibbles are of INT4";
      if (p.row_stride % 2 != 0) return "prepare: rows of nibbles want whole bytes";
      break;
    case Layout::kFragments:
      if (!is_integer && p.format != Format::kFp8) return "prepare: fragments want a format";
      if (p.rows_per_scale % (p.format == Format::kInt4 ? 32 : 16) != 0) {
        return "prepare: fragments want whole runs of 16 slots a scale, or of 32 for INT4";
      }
      if (!is_aligned(p.rows, 16) || p.head_stride % 16 != 0) {
        return "prepare: fragments want rows at multiples of 16 bytes";
      }
      break;
    default:
      return "prepare: a layout of the CPU";
  }
  if (p.per_column && p.scale_stride != p.dim) return "prepare: wants a scale a column";
  if (p.format != Format::kNone && (p.rows_per_scale < 1 || p.rows_per_scale > kMaxRowsPerScale)) {
    return "prepare: wants 1 to 128 rows a scale";
  }
  return nullptr;
}

}  // namespace

const char* launch_prepare(const PrepareParams& params, int, void* stream) {
  if (params.batch * params.out_heads * params.padded_slots == 0) return nullptr;
  if (const char* why = why_not(params)) return why;
  PrepareArgs args{};
  args.p = params;
  args.tiling = tiling_of(params);
  args.shared = shared_of(params, args.tiling);
  args.high = params.format == Format::kNone ? 0.0F : high_of(params.format);
  args.whole = whole_loads(params);
  args.whole_rows = has_whole_rows(params);
  switch (params.dtype) {
    case Dtype::kFloat32:
      return launch_rows<Dtype::kFloat32>(args, stream);
    case Dtype::kBFloat16:
      return launch_rows<Dtype::kBFloat16>(args, stream);
    case Dtype::kFloat16:
      return launch_rows<Dtype::kFloat16>(args, stream);
  }
  return "prepare: unknown dtype";
}

const char* launch_token_statistics(const PrepareParams& params, float* stats, void* stream) {
  if (params.batch * params.tokens == 0) return nullptr;
  if (const char* why = why_no_source(params)) return why;
  if (params.batch * params.tokens > INT32_MAX) return "prepare: wants fewer than 2^31 tokens";
  const TokenStatisticsArgs args{params, lanes_of(params), has_whole_chunks(params), stats};
  switch (params.dtype) {
    case Dtype::kFloat32:
      return launch_token_rows<Dtype::kFloat32>(args, stream);
    case Dtype::kBFloat16:
      return launch_token_rows<Dtype::kBFloat16>(args, stream);
    case Dtype::kFloat16:
      return launch_token_rows<Dtype::kFloat16>(args, stream);
  }
  return "prepare: unknown dtype";
}

int64_t column_scratch(const ColumnParams& params) {
  const PrepareParams& p = params.source;
  return p.batch * p.heads * ((p.tokens + kTokensPerRun - 1) / kTokensPerRun) * 3 * p.dim;
}

const char* launch_column_statistics(const ColumnParams& params, float* scratch, void* stream) {
  const PrepareParams& p = params.source;
  if (p.batch * p.heads == 0) return nullptr;
  if (const char* why = why_no_source(p)) return why;
  if (needs_token_stats(p) && p.token_stats == nullptr) return "prepare: wants token_stats";
  ColumnStatisticsArgs args{};
  args.c = params;
  args.lanes = lanes_of(p);
  args.runs = (p.tokens + kTokensPerRun - 1) / kTokensPerRun;
  args.whole = whole_loads(p);
  args.found = scratch;
  const char* why = nullptr;
  if (args.runs != 0) {
    why = p.dtype == Dtype::kFloat32    ? launch_column_runs<Dtype::kFloat32>(args, stream)
          : p.dtype == Dtype::kBFloat16 ? launch_column_runs<Dtype::kBFloat16>(args, stream)
                                        : launch_column_runs<Dtype::kFloat16>(args, stream);
  }
  return why != nullptr ? why : launch_join_runs(args, stream);
}

}  // namespace permattn::cuda
