// State in and out of memory, and the rows of the result.
#pragma once
#include "scores.cuh"

namespace permattn::sm90 {

PERMATTN_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0U, x, 1);
  return x + __shfl_xor_sync(~0U, x, 2);
}

// Begins with nothing, or with what earlier launches left.
template <class T>
PERMATTN_DEVICE void load_state(const AttentionArgs& args, int32_t head, const ThreadRows& rows,
                                Softmax<T>& state) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    state.high[i] = kMinusInfinity;
    state.total[i] = 0.0F;
  }
#pragma unroll
  for (int i = 0; i < T::kColumns; ++i) state.acc[i] = 0.0F;
  if (args.acc == nullptr) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (rows.token[i] < 0) continue;
    const int64_t row = static_cast<int64_t>(head) * args.num_q_tokens + rows.token[i];
    state.high[i] = args.high[row];
    // Shares of threads are added up at the end.
    if (!T::kSharesTotal || rows.pair == 0) state.total[i] = args.total[row];
    const float* from = args.acc + row * args.head_dim_v + 2 * rows.pair;
#pragma unroll
    for (int j = 0; j < T::kColumns / 4; ++j) {
      if (8 * j >= args.head_dim_v) continue;
      const auto two = *reinterpret_cast<const float2*>(from + 8 * j);
      state.acc[4 * j + 2 * i] = two.x;
      state.acc[4 * j + 2 * i + 1] = two.y;
    }
  }
}

// The sum of P of a row, in every thread that has a part of it.
template <class T>
PERMATTN_DEVICE float total_of(const Softmax<T>& state, int row) {
  return T::kSharesTotal ? quad_sum(state.total[row]) : state.total[row];
}

template <class T>
PERMATTN_DEVICE void store_state(const AttentionArgs& args, int32_t head, const ThreadRows& rows,
                                 const Softmax<T>& state) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = total_of(state, i);
    if (rows.token[i] < 0) continue;
    const int64_t row = static_cast<int64_t>(head) * args.num_q_tokens + rows.token[i];
    if (rows.pair == 0) {
      args.high[row] = state.high[i];
      args.total[row] = total;
    }
    float* to = args.acc + row * args.head_dim_v + 2 * rows.pair;
#pragma unroll
    for (int j = 0; j < T::kColumns / 4; ++j) {
      if (8 * j >= args.head_dim_v) continue;
      *reinterpret_cast<float2*>(to + 8 * j) =
          float2{state.acc[4 * j + 2 * i], state.acc[4 * j + 2 * i + 1]};
    }
  }
}

// Four words of each of four threads change places: thread t gets the word t of all, in their
// order.
PERMATTN_DEVICE void transpose(uint32_t (&word)[4], int32_t thread) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool is_odd = (thread & step) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = step == 1 ? 2 * i : i, high = low + step;
      const uint32_t got = __shfl_xor_sync(~0U, is_odd ? word[low] : word[high], step);
      word[low] = is_odd ? got : word[low];
      word[high] = is_odd ? word[high] : got;
    }
  }
}

// Results to the rows of their tokens, in pieces of 16 bytes.
template <class T>
PERMATTN_DEVICE void store_rows(const AttentionArgs& args, int32_t head, const ThreadRows& rows,
                                const Softmax<T>& state) {
  constexpr float kLn2 = 0.693147181F;
  const bool is_bf16 = T::kDtype == Dtype::kFloat32 ? args.out_dtype == Dtype::kBFloat16
                                                    : T::kDtype == Dtype::kBFloat16;
  char* out =
      static_cast<char*>(args.out.data) +
      (head / args.q_heads * args.out.stride_b + head % args.q_heads * args.out.stride_h) * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t token = rows.token[i];
    const float total = total_of(state, i);
    const float inverse = total == 0.0F ? 1.0F : 1.0F / total;
    if (rows.pair == 0 && token >= 0) {
      args.lse[static_cast<int64_t>(head) * args.num_q_tokens + token] =
          total == 0.0F ? kMinusInfinity : (state.high[i] + ptx::log2_approx(total)) * kLn2;
    }
#pragma unroll
    for (int j = 0; j < T::kColumns; j += 16) {
      uint32_t word[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float left = state.acc[j + 4 * n + 2 * i] * inverse;
        const float right = state.acc[j + 4 * n + 2 * i + 1] * inverse;
        word[n] = is_bf16 ? ptx::pack_bf16(left, right) : ptx::pack_f16(left, right);
      }
      transpose(word, rows.pair);
      const int32_t column = 2 * j + 8 * rows.pair;
      if (token < 0 || column >= args.head_dim_v) continue;
      *reinterpret_cast<uint4*>(out + (token * args.out.stride_s + column) * 2) =
          uint4{word[0], word[1], word[2], word[3]};
    }
  }
}

}  // namespace permattn::sm90
