// Host entries of the attention kernels. Every function returns why nothing was launched, or null;
// `stream` is a cudaStream_t.
#pragma once
#include "attention.h"
#include "config.h"

namespace permattn {

namespace sm80 {
const char* launch_attend(const cuda::AttentionArgs& args, const cuda::Config& config,
                          void* stream);
}

// There only in libraries that hold code for compute capability 9.0a.
namespace sm90 {
const char* launch_attend(const cuda::AttentionArgs& args, const cuda::Config& config,
                          void* stream);
}

namespace cuda {

// Carried softmax state as results, in token order.
struct FinishArgs {
  int64_t rows;  // B * Hq * Sq
  int32_t q_heads, num_q_tokens, head_dim_v;
  const float* acc;    // [B, Hq, Sq, Dv]
  const float* high;   // [B, Hq, Sq]
  const float* total;  // likewise
  Dtype out_dtype;
  TensorView out;  // [B, Hq, Sq, Dv]
  float* lse;      // [B, Hq, Sq]
};

const char* launch_finish(const FinishArgs& args, void* stream);

}  // namespace cuda
}  // namespace permattn
