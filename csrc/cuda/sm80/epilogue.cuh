// State in and out of memory, and the rows of the result.
#pragma once
#include "mainloop.cuh"

namespace permattn::sm80 {

// Begins with nothing, or with what earlier launches left.
template <class T>
PERMATTN_DEVICE void load_state(const AttentionArgs& args, int64_t head, const QueryRows<T>& q,
                                const LanePosition& at, Softmax<T>& state) {
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t token = q.token(m, half);
      const bool is_carried = args.acc != nullptr && token >= 0;
      const int64_t row = head * args.num_q_tokens + token;
      state.high[m][half] = is_carried ? args.high[row] : kMinusInfinity;
      state.total[m][2 * half] = is_carried ? args.total[row] : 0.0F;
      state.total[m][2 * half + 1] = 0.0F;
#pragma unroll
      for (int j = 0; j < T::kColumnTiles; ++j) {
        const int32_t column = 8 * j + 2 * at.pair;
        const bool is_there = is_carried && column < args.head_dim_v;
        const int64_t place = row * args.head_dim_v + column;
        state.acc[m][j][2 * half] = is_there ? args.acc[place] : 0.0F;
        state.acc[m][j][2 * half + 1] = is_there ? args.acc[place + 1] : 0.0F;
      }
    }
  }
}

template <class T>
PERMATTN_DEVICE void store_state(const AttentionArgs& args, int64_t head, const QueryRows<T>& q,
                                 const LanePosition& at, const Softmax<T>& state) {
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t token = q.token(m, half);
      if (token < 0) continue;
      const int64_t row = head * args.num_q_tokens + token;
      if (at.pair == 0) {
        args.high[row] = state.high[m][half];
        args.total[row] = state.total[m][2 * half];
      }
#pragma unroll
      for (int j = 0; j < T::kColumnTiles; ++j) {
        const int32_t column = 8 * j + 2 * at.pair;
        if (column >= args.head_dim_v) continue;
        float* to = args.acc + row * args.head_dim_v + column;
        to[0] = state.acc[m][j][2 * half];
        to[1] = state.acc[m][j][2 * half + 1];
      }
    }
  }
}

struct alignas(16) Chunk {
  uint32_t words[4];
};

// Results of a warp's rows to the rows of their tokens, through shared memory so that a row is
// written in pieces of 16 bytes. A barrier comes before: the tile was the keys'.
template <class T>
PERMATTN_DEVICE void store_rows(const AttentionArgs& args, const device::QueryTile& tile,
                                int64_t head, const QueryRows<T>& q, const int32_t* tokens,
                                int32_t first_row, const LanePosition& at, const Softmax<T>& state,
                                char* out_tile) {
  using Layout = typename T::OutLayout;
  constexpr float kLn2 = 0.693147181F;
  const bool is_bf16 = T::kDtype == Dtype::kFloat32 ? args.out_dtype == Dtype::kBFloat16
                                                    : T::kDtype == Dtype::kBFloat16;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = state.total[m][2 * half];
      const float inverse = total == 0.0F ? 1.0F : 1.0F / total;
      const int32_t row = first_row + 16 * m + 8 * half + at.row;
      if (at.pair == 0 && q.token(m, half) >= 0) {
        args.lse[head * args.num_q_tokens + q.token(m, half)] =
            total == 0.0F ? kMinusInfinity : (state.high[m][half] + ptx::log2_approx(total)) * kLn2;
      }
#pragma unroll
      for (int j = 0; j < T::kColumnTiles; ++j) {
        const float left = state.acc[m][j][2 * half] * inverse;
        const float right = state.acc[m][j][2 * half + 1] * inverse;
        *reinterpret_cast<uint32_t*>(out_tile + Layout::offset(row, 16 * j) + 4 * at.pair) =
            is_bf16 ? ptx::pack_bf16(left, right) : ptx::pack_f16(left, right);
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = T::kDim / 8;
  char* out = static_cast<char*>(args.out.data) +
              (tile.b * args.out.stride_b + tile.h * args.out.stride_h) * 2;
  for (int i = at.lane; i < T::kWarpRows * kChunks; i += 32) {
    const int row = first_row + i / kChunks, column = i % kChunks * 8;
    const int32_t token = tokens[row];
    if (token < 0 || column >= args.head_dim_v) continue;
    *reinterpret_cast<Chunk*>(out + (token * args.out.stride_s + column) * 2) =
        *reinterpret_cast<const Chunk*>(out_tile + Layout::offset(row, 2 * column));
  }
}

}  // namespace permattn::sm80
