// Q of a tile: gathered by token or slot, and read into the registers of warps.
#pragma once
#include "mainloop.cuh"

namespace permattn::sm80 {

template <class T>
PERMATTN_DEVICE void copy_queries(const AttentionArgs& args, const device::QueryTile& tile,
                                  const int32_t* tokens, int32_t thread, char* q_tile) {
  constexpr int64_t kBytes = T::kQuantisedQk ? 1 : 2;
  const char* base = static_cast<const char*>(args.q.data) +
                     (tile.b * args.q.stride_b + tile.h * args.q.stride_h) * kBytes;
  const int64_t stride = args.q.stride_s * kBytes;
  device::copy_rows<typename T::QLayout, T::kThreads>(
      q_tile, thread, args.head_dim * bits_of(T::kQk) / 8, [&](int row) -> device::RowSource {
        const int32_t from = T::kQuantisedQk ? tile.first_slot + row : tokens[row];
        return {base + (tokens[row] < 0 ? 0 : from) * stride, tokens[row] >= 0};
      });
}

// Scales of a tile's rows times the softmax's, in shared memory.
template <class T>
PERMATTN_DEVICE void stage_factors(const AttentionArgs& args, const device::QueryTile& tile,
                                   int32_t thread, float* factors) {
  const int64_t head = static_cast<int64_t>(tile.b) * args.q_heads + tile.h;
  const int64_t groups = (args.num_q_slots + args.q_rows - 1) / args.q_rows;
#pragma unroll
  for (int first = 0; first < T::kBlockM; first += T::kThreads) {
    const int row = first + thread;
    if (row >= T::kBlockM) break;
    float scale = 0.0F;
    if (row < tile.num_rows) {
      scale = args.q_scale[head * groups + (tile.first_slot + row) / args.q_rows];
    }
    factors[row] = scale * fabsf(args.scale_log2);
  }
}

// What a warp needs of its rows; their numbers, where they stay in registers.
template <class T>
PERMATTN_DEVICE void load_queries(const AttentionArgs& args, const typename T::Bookkeeping& books,
                                  const char* shared, int32_t first_row, const LanePosition& at,
                                  QueryRows<T>& q) {
  q.shared = shared;
  q.tokens = books.q_tokens + first_row + at.row;
  q.factors = books.q_factors + first_row + at.row;
  q.scale = fmaxf(fabsf(args.scale_log2), kLeastFactor);
  // A warp's rows lie behind one another in every panel.
  constexpr uint32_t kPanelBytes = T::QLayout::kPanelBytes;
  q.address = MatrixAddress<typename T::QLayout>::of_a(
      T::kQOffset + static_cast<uint32_t>(first_row) * kPanelBytes, at.lane);
  if constexpr (T::kQInRegisters) {
#pragma unroll
    for (int step = 0; step < T::kQkSteps; ++step) q.read(step, q.fragments[step]);
  }
}

}  // namespace permattn::sm80
