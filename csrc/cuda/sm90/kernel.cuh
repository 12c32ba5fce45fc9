// Attention for sm_90a: blocks that stay, each of a warpgroup that feeds and two that multiply.
#pragma once
#include <type_traits>

#include "feed.cuh"
#include "math.cuh"

namespace permattn::sm90 {

constexpr int kMathWarps = kHalves * 4;

template <class T>
PERMATTN_DEVICE void begin_block(char* shared, int32_t thread) {
  auto& books = *reinterpret_cast<typename T::Books*>(shared + T::kBooksOffset);
  if (thread == 0) {
    for (int i = 0; i < T::kEmptyV + T::kStages; ++i) {
      const bool is_full = i == T::kFullQ || (i >= T::kFullK && i < T::kEmptyK);
      ptx::mbarrier_init(books.barriers + i, is_full ? kFeedThreads : kMathWarps);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (T::kOnesRows > 0) {
    constexpr uint32_t kOnes = 0x38383838U;
    constexpr int kWords = T::kOnesRows * T::VLayout::kRowBytes / 4;
    for (int i = thread; i < T::kStages * kWords; i += kThreads) {
      char* to = shared + T::kVOffset + i / kWords * T::kVStride + T::VLayout::kBytes;
      reinterpret_cast<uint32_t*>(to)[i % kWords] = kOnes;
    }
    ptx::fence_async_proxy();
  }
  __syncthreads();
}

template <class T>
PERMATTN_GLOBAL void __launch_bounds__(kThreads, 1)
    attention_kernel(const __grid_constant__ LaunchArgs launch) {
  PERMATTN_DYNAMIC_SHARED(shared);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  begin_block<T>(shared, thread);
  // The same for all lanes of a warp, and known to be.
  const int32_t group = __shfl_sync(~0U, thread / ptx::kWarpgroupThreads, 0);
  if (group == 0) {
    ptx::shrink_registers<T::kShape.feed_registers>();
    Feed<T>(launch, shared, thread).run();
  } else {
    ptx::grow_registers<T::kShape.math_registers>();
    Math<T>(launch, shared, group - 1, thread % ptx::kWarpgroupThreads).run();
  }
}

}  // namespace permattn::sm90
