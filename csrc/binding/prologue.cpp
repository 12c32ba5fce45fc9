#include "prologue.h"

namespace permattn::binding {

const float* floats_of(const Tensor& x, const char* name, int64_t size) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == size,
                  name, ": wants ", size, " contiguous float32");
  return static_cast<const float*>(x.data_ptr());
}

namespace {

constexpr size_t kIntsPerTransform = 8;

// The transform of one tensor of `heads` and `dim`; takes its tensors from `next` on.
Transform transform_of(const std::vector<Tensor>& tensors, size_t& next, const int64_t* n,
                       double eps, int64_t heads, int64_t dim) {
  size_t count = 0;
  for (int i = 1; i < 5; ++i) count += n[i] != 0;
  STD_TORCH_CHECK(next + count <= tensors.size(), "prologue: too few tensors");
  STD_TORCH_CHECK(n[0] >= 0 && n[0] <= 2 && n[6] >= 0, "prologue: bad numbers");
  Transform t{};
  t.norm = static_cast<Transform::Norm>(n[0]);
  t.across_heads = n[5] != 0;
  t.rope_start = n[6];
  t.interleaved = n[7] != 0;
  t.eps = static_cast<float>(eps);
  const int64_t width = t.across_heads ? heads * dim : dim;
  if (n[1] != 0) t.weight = floats_of(tensors[next++], "prologue: weight", width);
  if (n[2] != 0) t.bias = floats_of(tensors[next++], "prologue: bias", width);
  STD_TORCH_CHECK((n[3] != 0) == (n[4] != 0), "prologue: wants cos and sin, or none");
  if (n[3] == 0) return t;
  const Tensor& cos = tensors[next++];
  STD_TORCH_CHECK(cos.dim() == 2 && 2 * cos.size(1) <= dim, "prologue: cos does not fit");
  t.rope_rows = cos.size(0);
  t.rope_width = cos.size(1);
  t.cos = floats_of(cos, "prologue: cos", t.rope_rows * t.rope_width);
  t.sin = floats_of(tensors[next++], "prologue: sin", t.rope_rows * t.rope_width);
  return t;
}

}  // namespace

std::vector<Transform> transforms_of(const std::vector<Tensor>& tensors,
                                     const std::vector<int64_t>& ints,
                                     const std::vector<double>& floats,
                                     const std::vector<Heads>& sizes) {
  std::vector<Transform> transforms(sizes.size());
  if (ints.empty()) return transforms;
  STD_TORCH_CHECK(ints.size() >= kIntsPerTransform * sizes.size() && floats.size() >= sizes.size(),
                  "prologue: too few numbers");
  size_t next = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    transforms[i] = transform_of(tensors, next, &ints[kIntsPerTransform * i], floats[i],
                                 sizes[i].heads, sizes[i].dim);
  }
  return transforms;
}

PrepareParams source_of(const Tensor& x, const std::vector<Tensor>& prologue_tensors,
                        const std::vector<int64_t>& prologue_ints,
                        const std::vector<double>& prologue_floats) {
  PrepareParams p{};
  p.dtype = dtype_of(x);
  p.x = view_of(x, "x");
  p.batch = x.size(0);
  p.heads = x.size(1);
  p.tokens = x.size(2);
  STD_TORCH_CHECK(x.size(3) >= 1 && x.size(3) <= 256, "x: wants 1 to 256 columns, got ", x.size(3));
  p.dim = static_cast<int32_t>(x.size(3));
  p.transform =
      transforms_of(prologue_tensors, prologue_ints, prologue_floats, {{p.heads, p.dim}})[0];
  return p;
}

void add_seen(ColumnParams& columns, const std::optional<Tensor>& seen) {
  const PrepareParams& p = columns.source;
  if (!seen.has_value()) return;
  STD_TORCH_CHECK(seen->dim() == 3 && seen->is_contiguous() &&
                      seen->scalar_type() == ScalarType::Bool && seen->size(2) == p.tokens &&
                      (seen->size(0) == 1 || seen->size(0) == p.batch) &&
                      (seen->size(1) == 1 || seen->size(1) == p.heads),
                  "seen: wants contiguous bool [1 or B, 1 or H, S]");
  columns.seen = static_cast<const uint8_t*>(seen->data_ptr());
  columns.seen_stride_b = seen->size(0) == 1 ? 0 : seen->size(1) * p.tokens;
  columns.seen_stride_h = seen->size(1) == 1 ? 0 : p.tokens;
}

}  // namespace permattn::binding
