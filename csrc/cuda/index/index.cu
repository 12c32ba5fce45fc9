// Launches of index.h.
#include "index.h"

#include <numeric>

#include "blocks.cuh"
#include "order.cuh"

namespace permattn::index {

PERMATTN_GLOBAL void count_mask_kernel(const __grid_constant__ cuda::CompactParams p) {
  count_mask(p);
}
PERMATTN_GLOBAL void list_mask_kernel(const __grid_constant__ cuda::CompactParams p) {
  list_mask(p);
}
PERMATTN_GLOBAL void clear_bits_kernel(const __grid_constant__ cuda::TransposeParams p) {
  clear_bits(p);
}
PERMATTN_GLOBAL void set_pairs_kernel(const __grid_constant__ cuda::TransposeParams p) {
  set_pairs(p);
}
PERMATTN_GLOBAL void count_pairs_kernel(const __grid_constant__ cuda::TransposeParams p) {
  count_pairs(p);
}
PERMATTN_GLOBAL void list_pairs_kernel(const __grid_constant__ cuda::TransposeParams p) {
  list_pairs(p);
}

struct SumArgs {
  cuda::Lists lists;
  int64_t rows;
};
PERMATTN_GLOBAL void __launch_bounds__(kSumThreads)
    sum_lengths_kernel(const __grid_constant__ SumArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  sum_lengths(args.lists, args.rows, reinterpret_cast<int32_t*>(shared));
}

PERMATTN_GLOBAL void __launch_bounds__(kSumThreads)
    order_kernel(const __grid_constant__ OrderArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  order_items(args, shared);
}

template <Dtype kDtype>
PERMATTN_GLOBAL void __launch_bounds__(kThreads)
    pool_kernel(const __grid_constant__ PoolArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  pool<kDtype>(args, shared);
}

PERMATTN_GLOBAL void __launch_bounds__(kThreads)
    score_kernel(const __grid_constant__ cuda::ScoreParams p) {
  PERMATTN_DYNAMIC_SHARED(shared);
  score(p, shared);
}

PERMATTN_GLOBAL void __launch_bounds__(kThreads)
    strongest_kernel(const __grid_constant__ cuda::StrongestParams p) {
  PERMATTN_DYNAMIC_SHARED(shared);
  choose_strongest(p, shared);
}

}  // namespace permattn::index

namespace permattn::cuda {
namespace {

int64_t blocks_for(int64_t count, int64_t each) { return (count + each - 1) / each; }

// A warp a row.
template <class Kernel, class Args>
const char* launch_by_row(Kernel kernel, int64_t rows, void* stream, const Args& args,
                          int64_t shared_bytes = 0) {
  if (rows == 0) return nullptr;
  if (rows > INT32_MAX) return "index: wants fewer than 2^31 rows of all heads";
  return launch(kernel, blocks_for(rows, index::kWarps), index::kThreads, shared_bytes, stream,
                args);
}

const char* launch_sum(const Lists& lists, int64_t heads, int64_t rows, void* stream) {
  return launch(index::sum_lengths_kernel, heads, index::kSumThreads, 32 * sizeof(int32_t), stream,
                index::SumArgs{lists, rows});
}

}  // namespace

const char* launch_compact(const CompactParams& p, void* stream) {
  if (p.heads == 0) return nullptr;
  const int64_t rows = p.heads * p.rows;
  if (const char* why = launch_by_row(index::count_mask_kernel, rows, stream, p)) return why;
  if (const char* why = launch_sum(p.lists, p.heads, p.rows, stream)) return why;
  return launch_by_row(index::list_mask_kernel, rows, stream, p);
}

int64_t transpose_scratch(const TransposeParams& p) {
  return p.heads * p.columns * 2 * index::words_of(p.rows);
}

const char* launch_transpose(const TransposeParams& p, void* stream) {
  if (p.heads == 0) return nullptr;
  if (p.rows == 0) return "transpose: wants query blocks";
  const int64_t words = transpose_scratch(p), columns = p.heads * p.columns;
  if (words > 0) {
    const char* why = launch(index::clear_bits_kernel, blocks_for(words, index::kThreads),
                             index::kThreads, 0, stream, p);
    if (why != nullptr) return why;
  }
  if (const char* why = launch_by_row(index::set_pairs_kernel, p.heads * p.rows, stream, p)) {
    return why;
  }
  if (const char* why = launch_by_row(index::count_pairs_kernel, columns, stream, p)) return why;
  if (const char* why = launch_sum(p.lists, p.heads, p.columns, stream)) return why;
  return launch_by_row(index::list_pairs_kernel, columns, stream, p);
}

int64_t order_scratch(const AttentionArgs& a) {
  return 3 * static_cast<int64_t>(a.batch) * a.q_heads * items_per_head(a);
}

const char* launch_order(const AttentionArgs& a, int32_t* order, uint32_t* scratch, void* stream) {
  const int64_t count = order_scratch(a) / 3;
  if (count == 0) return nullptr;
  if (count > INT32_MAX / 4) return "order: too many items";
  index::OrderArgs args{a, 0, 0, order, scratch};
  for (int32_t i = 0; i < a.num_parts; ++i) {
    args.lanes_per_step = std::gcd(args.lanes_per_step, a.parts[i].block_kv);
  }
  // A list names no block twice.
  int64_t most = 0;
  for (int32_t i = 0; i < a.num_parts; ++i) {
    const int64_t block = a.parts[i].block_kv;
    most +=
        blocks_for(a.parts[i].num_slots, block) * (block / args.lanes_per_step) * a.tiles_per_item;
  }
  for (args.passes = 1; args.passes < 4 && most >> (args.passes * index::kDigitBits) != 0;) {
    ++args.passes;
  }
  return launch(index::order_kernel, 1, index::kSumThreads, index::kOrderShared, stream, args);
}

const char* launch_pool(const PoolParams& p, void* stream) {
  if (p.dim < 1 || p.dim > 256) return "pool: wants 1 to 256 columns";
  if (p.block < 1) return "pool: wants blocks of at least one slot";
  index::PoolArgs args{};
  args.source.dtype = p.dtype;
  args.source.batch = p.batch;
  args.source.heads = p.heads;
  args.source.tokens = p.tokens;
  args.source.dim = p.dim;
  args.source.x = p.x;
  args.token_of_slot = p.token_of_slot;
  args.slots = p.slots;
  args.block = p.block;
  args.blocks = blocks_for(p.slots, p.block);
  args.lanes = lanes_of(args.source);
  args.whole_x = has_whole_chunks(args.source);
  args.means = p.means;
  const int64_t blocks = p.batch * p.heads * args.blocks;
  if (blocks == 0) return nullptr;
  const auto run = [&](auto kernel) {
    return launch(kernel, blocks, index::kThreads, index::kPoolShared, stream, args);
  };
  switch (p.dtype) {
    case Dtype::kFloat32:
      return run(index::pool_kernel<Dtype::kFloat32>);
    case Dtype::kBFloat16:
      return run(index::pool_kernel<Dtype::kBFloat16>);
    case Dtype::kFloat16:
      return run(index::pool_kernel<Dtype::kFloat16>);
  }
  return "pool: unknown dtype";
}

const char* launch_scores(const ScoreParams& p, void* stream) {
  const int64_t blocks = p.batch * p.q_heads * blocks_for(p.rows, index::kScoreTile) *
                         blocks_for(p.columns, index::kScoreTile);
  if (blocks == 0) return nullptr;
  return launch(index::score_kernel, blocks, index::kThreads, index::kScoreShared, stream, p);
}

const char* launch_strongest(const StrongestParams& p, void* stream) {
  const int64_t rows = p.heads * p.rows;
  if (p.count == 0) return nullptr;
  return launch_by_row(index::strongest_kernel, rows, stream, p, index::kStrongestShared);
}

}  // namespace permattn::cuda
