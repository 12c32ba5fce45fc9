// One tile of queries against every key that its lists name: a pipeline of cp.async copies, lanes
// of keys staged a tile ahead of them.
#pragma once
#include "epilogue.cuh"
#include "query_rows.cuh"

namespace permattn::sm80 {

template <class T>
PERMATTN_DEVICE void copy_keys(const AttentionArgs& args, const PartHead* heads,
                               const LaneTile<T::kBlockN>& lanes, int32_t thread, char* stage) {
  const PartArgs& part = args.parts[lanes.list / 2];
  const PartHead& head = heads[lanes.list / 2];
  device::copy_lanes<typename T::KLayout, T::kThreads>(
      stage, thread, lanes, T::kQuantisedQk || part.k_in_slots, head.k, head.k_row_bytes,
      args.head_dim * bits_of(T::kQk) / 8);
  char* v_tile = stage + T::kKTileBytes;
  if constexpr (!T::kQuantisedPv) {
    device::copy_lanes<typename T::VLayout, T::kThreads>(
        v_tile, thread, lanes, part.v_in_slots, head.v, head.v_row_bytes, args.head_dim_v * 2);
  } else {
    const int64_t first = static_cast<int64_t>(lanes.group) * args.head_dim_v;
    device::copy_rows<typename T::VLayout, T::kThreads>(
        v_tile, thread, row_bytes(T::kPv, T::kBlockN), [&](int row) -> device::RowSource {
          const bool is_there = lanes.group >= 0 && row < args.head_dim_v;
          return {head.v + (is_there ? first + row : 0) * head.v_row_bytes, is_there};
        });
    constexpr int kFloats = kChunkBytes / 4;
    for (int i = thread; i < T::kDim / kFloats; i += T::kThreads) {
      const bool is_there = lanes.group >= 0 && i * kFloats < args.head_dim_v;
      const float* from = head.v_scale + (is_there ? first + i * kFloats : 0);
      ptx::cp_async_16(v_tile + T::kVTileBytes + i * kChunkBytes, from, is_there ? kChunkBytes : 0);
    }
  }
}

// Facts of the tile and its parts.
template <class T>
PERMATTN_DEVICE void begin_tile(const AttentionArgs& args, const device::QueryTile& tile,
                                int32_t thread, typename T::Bookkeeping& books) {
  device::stage_query_tokens<T::kBlockM, T::kThreads>(args, tile, thread, books.q_tokens);
  if (thread < args.num_parts) {
    books.heads[thread] = device::part_head<T::kQk, T::kPv>(args, tile, thread);
  }
  if constexpr (T::kQuantisedQk) stage_factors<T>(args, tile, thread, books.q_factors);
  __syncthreads();
  if (thread == 0) books.q_span = device::token_span<T::kBlockM>(books.q_tokens);
  __syncthreads();
}

template <class T>
PERMATTN_DEVICE void attend(const AttentionArgs& args, char* shared) {
  auto& books = *reinterpret_cast<typename T::Bookkeeping*>(shared + T::kBookkeepingOffset);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto tile = device::query_tile<T::kBlockM>(args, static_cast<int32_t>(blockIdx.x));
  const int64_t head = static_cast<int64_t>(tile.b) * args.q_heads + tile.h;
  const LanePosition at{thread % 32, thread % 32 / 4, thread % 4};
  const int32_t first_row = thread / 32 * T::kWarpRows;

  begin_tile<T>(args, tile, thread, books);
  char* q_tile = shared + T::kQOffset;
  copy_queries<T>(args, tile, books.q_tokens, thread, q_tile);
  ptx::cp_async_commit();

  // Read again in every turn: registers are dear.
  const auto queries = [&] {
    return device::QueryTokens{books.q_tokens, T::kBlockM, books.q_span,
                               args.q_token.data == nullptr};
  };
  using Stager = device::LaneStager<T::kBlockN, T::kQuantisedQk>;
  Stager stager(args, books.heads, thread);
  const int32_t num_tiles = device::num_key_tiles<T::kBlockN>(books.heads, args.num_parts);
  if (thread < T::kBlockN) {
#pragma unroll 1
    for (int i = -Stager::kDelay; i < T::kStages; ++i) {
      stager.step(queries(), books.lanes[i & (T::kRing - 1)],
                  books.lanes[(i + 1) & (T::kRing - 1)]);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  if (args.scale_log2 < 0.0F) {
    device::negate_queries<T::kQk, T::kThreads, T::kQBytes>(thread, q_tile);
    __syncthreads();
  }
  QueryRows<T> q;
  load_queries<T>(args, books, shared, first_row, at, q);
  Softmax<T> state;
  load_state<T>(args, head, q, at, state);
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) {
    if (i < num_tiles) {
      copy_keys<T>(args, books.heads, books.lanes[i], thread, shared + i * T::kStageBytes);
    }
    ptx::cp_async_commit();
  }

  const bool warp_idles = first_row >= tile.num_rows;
  const auto lanes = [&](int32_t i) -> LaneTile<T::kBlockN>& {
    return books.lanes[i & (T::kRing - 1)];
  };
#pragma unroll 1
  for (int32_t i = 0; i < num_tiles; ++i) {
    ptx::cp_async_wait<T::kStages - 2>();
    // Now all have tile i, and nobody needs tile i - 1.
    __syncthreads();
    const int32_t last = i + T::kStages - 1;
    if (last < num_tiles) {
      copy_keys<T>(args, books.heads, lanes(last), thread,
                   shared + static_cast<uint32_t>(last) % T::kStages * T::kStageBytes);
    }
    ptx::cp_async_commit();
    if (thread < T::kBlockN) stager.step(queries(), lanes(last + 1), lanes(last + 2));
    if (!warp_idles) {
      attend_tile<T>(args, q, lanes(i), static_cast<uint32_t>(i) % T::kStages * T::kStageBytes, at,
                     state);
    }
  }
  ptx::cp_async_wait<0>();
  if (args.acc != nullptr) {
    store_state<T>(args, head, q, at, state);
    return;
  }
  __syncthreads();
  store_rows<T>(args, tile, head, q, books.q_tokens, first_row, at, state, shared);
}

// Whether the architecture that is compiled for has the products of a kernel. No config names one
// that it has not, whose code is empty.
template <class T>
PERMATTN_HD constexpr bool has_products() {
#if defined(__CUDA_ARCH__)
  // Between them FP8 is emulated without whole warpgroups.
  if (T::kPv == Format::kFp8) return __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200;
  if (T::kQk == Format::kInt4 || T::kPv == Format::kInt4) return __CUDA_ARCH__ < 900;
#endif
  return true;
}

template <class T>
PERMATTN_GLOBAL void __launch_bounds__(T::kThreads, T::kShape.blocks)
    attention_kernel(const __grid_constant__ AttentionArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  if constexpr (has_products<T>()) attend<T>(args, shared);
}

}  // namespace permattn::sm80
