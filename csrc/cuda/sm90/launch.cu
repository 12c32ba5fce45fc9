#include "launch.h"

#include "kernels.h"

#if !defined(__CUDACC__)
#include "record.h"
#endif

namespace permattn::sm90 {
namespace {

int32_t greatest_divisor(int32_t a, int32_t b) {
  while (b != 0) {
    const int32_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

bool is_aligned(const TensorView& x, int32_t element_bytes) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride_b * element_bytes % 16 == 0 &&
         x.stride_h * element_bytes % 16 == 0 && x.stride_s * element_bytes % 16 == 0;
}

// Rows of k or v as boxes of `box_rows` by one panel. False: there is no such map.
bool make_rows_map(const TensorView& x, int32_t element_bytes, int32_t columns, int64_t rows,
                   int32_t heads, int32_t batch, int32_t box_rows, int32_t panel_bytes,
                   cuda::TensorMap* map) {
  if (!is_aligned(x, element_bytes) || x.stride_s == 0 || rows == 0) return false;
  cuda::TensorBox box{};
  box.data = x.data;
  box.rank = 4;
  box.element_bytes = element_bytes;
  const int64_t dims[] = {columns, rows, x.stride_h == 0 ? 1 : heads, x.stride_b == 0 ? 1 : batch};
  // An axis of one needs a stride all the same.
  const int64_t row = x.stride_s * element_bytes;
  const int64_t strides[] = {row, x.stride_h == 0 ? row : x.stride_h * element_bytes,
                             x.stride_b == 0 ? row : x.stride_b * element_bytes};
  const int32_t sizes[] = {panel_bytes / element_bytes, box_rows, 1, 1};
  for (int i = 0; i < 4; ++i) {
    box.dims[i] = dims[i];
    box.box[i] = sizes[i];
    if (i < 3) box.strides[i] = strides[i];
  }
  box.swizzle = panel_bytes;
  return cuda::encode_tensor_map(box, map) == nullptr;
}

// Groups of small values, [groups, Dv, 64].
template <class T>
bool make_groups_map(const AttentionArgs& args, const PartArgs& part, cuda::TensorMap* map) {
  const int64_t groups = (part.num_slots + args.kv_rows - 1) / args.kv_rows;
  cuda::TensorBox box{};
  box.data = part.v_tiles;
  box.rank = 3;
  box.element_bytes = 1;
  box.dims[0] = T::kBlockN;
  box.dims[1] = args.head_dim_v;
  box.dims[2] = groups * part.v_heads * args.batch;
  box.strides[0] = T::kBlockN;
  box.strides[1] = static_cast<int64_t>(T::kBlockN) * args.head_dim_v;
  box.box[0] = T::kBlockN;
  box.box[1] = T::kDim;
  box.box[2] = 1;
  box.swizzle = T::VLayout::kPanelBytes;
  if (reinterpret_cast<uintptr_t>(part.v_tiles) % 16 != 0 || box.dims[2] > INT32_MAX) return false;
  return groups > 0 && cuda::encode_tensor_map(box, map) == nullptr;
}

template <class T>
void make_maps(const AttentionArgs& args, const PartArgs& part, PartMaps* maps) {
  // Boxes begin at whole atoms of the swizzle.
  constexpr int32_t kAtomRows = 8;
  maps->box_rows = greatest_divisor(part.block_kv, T::kBlockN);
  const bool has_boxes = maps->box_rows % kAtomRows == 0;
  const bool is_identity = part.kv_token.data == nullptr;
  const int64_t tokens = part.num_slots < args.num_kv_tokens ? part.num_slots : args.num_kv_tokens;
  const bool k_in_slots = T::kQuantisedQk || part.k_in_slots;
  maps->k_moves_h = part.k.stride_h != 0;
  maps->k_moves_b = part.k.stride_b != 0;
  maps->v_moves_h = part.v.stride_h != 0;
  maps->v_moves_b = part.v.stride_b != 0;
  if (has_boxes && (k_in_slots || is_identity)) {
    maps->has_k = make_rows_map(part.k, T::kQuantisedQk ? 1 : 2, args.head_dim,
                                k_in_slots ? part.num_slots : tokens, part.k_heads, args.batch,
                                maps->box_rows, T::KLayout::kPanelBytes, &maps->k);
  }
  if constexpr (T::kQuantisedPv) {
    maps->has_v = make_groups_map<T>(args, part, &maps->v);
  } else if (has_boxes && (part.v_in_slots || is_identity)) {
    maps->has_v =
        make_rows_map(part.v, 2, args.head_dim_v, part.v_in_slots ? part.num_slots : tokens,
                      part.v_heads, args.batch, maps->box_rows, T::VLayout::kPanelBytes, &maps->v);
  }
}

// Blocks that run at the same time.
int32_t num_processors() {
#if defined(__CUDACC__)
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
#else
  return shim::recorded_processors;
#endif
}

template <class T>
const char* launch(const AttentionArgs& args, const char* kernel, void* stream) {
  const int64_t all = static_cast<int64_t>(items_per_head(args)) * args.q_heads * args.batch;
  if (all > INT32_MAX) return "a launch takes up to 2^31 - 1 tiles of queries";
  const int32_t processors = num_processors();
  if (processors < 1) return "the device does not tell how many processors it has";
  LaunchArgs made{};
  made.attention = args;
  made.num_items = static_cast<int32_t>(all);
  for (int i = 0; i < args.num_parts; ++i) make_maps<T>(args, args.parts[i], &made.maps[i]);
  const int32_t blocks = made.num_items < processors ? made.num_items : processors;
#if defined(__CUDACC__)
  static_cast<void>(kernel);
  return launch_kernel<T>(made, blocks, stream);
#else
  static_cast<void>(stream);
  if (shim::refusal() != nullptr) return shim::refusal();
  shim::record_launch(kernel, blocks, kThreads, T::kSharedBytes, &made, sizeof(made));
  return nullptr;
#endif
}

// visitor(Kernel<T>{}, name) of the kernel of a config.
template <class T>
struct Kernel {};

template <class Visitor>
const char* visit_kernel(const cuda::Config& config, Dtype dtype, const Visitor& visitor) {
  // Where P V is quantised, one kernel writes every dtype.
  if (config.pv != Format::kNone) dtype = Dtype::kFloat32;
#define PERMATTN_SM90_TRY(dtype_, qk_, pv_, dim_, block_n_)                                   \
  if (dtype == Dtype::dtype_ && config.qk == Format::qk_ && config.pv == Format::pv_ &&       \
      config.dim == dim_ && config.block_n == block_n_) {                                     \
    return visitor(Kernel<Traits<Dtype::dtype_, Format::qk_, Format::pv_, dim_, block_n_>>{}, \
                   #dtype_ "_" #qk_ "_" #pv_ "_" #dim_ "_" #block_n_);                        \
  }
  PERMATTN_SM90_KERNELS(PERMATTN_SM90_TRY)
#undef PERMATTN_SM90_TRY
  return "no kernel for these formats and head dims";
}

}  // namespace

const char* launch_attend(const AttentionArgs& args, const cuda::Config& config, void* stream) {
  return visit_kernel(config, args.out_dtype, [&]<class T>(Kernel<T>, const char* name) {
    return launch<T>(args, name, stream);
  });
}

int64_t shared_bytes(const cuda::Config& config, Dtype dtype) {
  int64_t bytes = 0;
  visit_kernel(config, dtype, [&]<class T>(Kernel<T>, const char*) -> const char* {
    bytes = T::kSharedBytes;
    return nullptr;
  });
  return bytes;
}

}  // namespace permattn::sm90
