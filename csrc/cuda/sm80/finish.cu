// Softmax state of several launches as results. Rows stand in token order, so nothing is looked up.
#include "../attend.h"
#include "../primitives/numbers.cuh"

namespace permattn::cuda {

constexpr int kThreads = 256;

// A thread writes 8 columns of a row.
constexpr int kColumns = 8;

struct alignas(16) Chunk {
  uint32_t words[kColumns / 2];
};
struct alignas(16) Quad {
  float x[4];
};

PERMATTN_GLOBAL void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ FinishArgs args) {
  constexpr float kLn2 = 0.693147181F;
  const int32_t chunks = args.head_dim_v / kColumns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = i / chunks;
  const auto column = static_cast<int32_t>(i - row * chunks) * kColumns;
  if (row >= args.rows) return;
  const float total = args.total[row];
  const float inverse = total == 0.0F ? 1.0F : 1.0F / total;
  const auto* acc = reinterpret_cast<const Quad*>(args.acc + row * args.head_dim_v + column);
  const Quad quads[2] = {acc[0], acc[1]};
  Chunk chunk;
#pragma unroll
  for (int k = 0; k < kColumns / 2; ++k) {
    const float left = quads[k / 2].x[k % 2 * 2] * inverse;
    const float right = quads[k / 2].x[k % 2 * 2 + 1] * inverse;
    chunk.words[k] = args.out_dtype == Dtype::kBFloat16 ? ptx::pack_bf16(left, right)
                                                        : ptx::pack_f16(left, right);
  }
  const int64_t head = row / args.num_q_tokens;
  const int64_t b = head / args.q_heads;
  const int64_t to = b * args.out.stride_b + (head - b * args.q_heads) * args.out.stride_h +
                     (row - head * args.num_q_tokens) * args.out.stride_s + column;
  *reinterpret_cast<Chunk*>(static_cast<char*>(args.out.data) + 2 * to) = chunk;
  if (column == 0) {
    args.lse[row] =
        total == 0.0F ? -__builtin_inff() : (args.high[row] + ptx::log2_approx(total)) * kLn2;
  }
}

const char* launch_finish(const FinishArgs& args, void* stream) {
  if (args.rows == 0 || args.head_dim_v == 0) return nullptr;
  if (args.head_dim_v % kColumns != 0) return "finish: wants head dims that are multiples of 8";
  const int64_t chunks = args.rows * (args.head_dim_v / kColumns);
  return launch(finish_kernel, (chunks + kThreads - 1) / kThreads, kThreads, 0, stream, args);
}

}  // namespace permattn::cuda
