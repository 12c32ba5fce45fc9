// The host side of the kernels for sm_90a.
#pragma once
#include "../attend.h"

namespace permattn::sm90 {

// Items of work of a launch, in the numbers of `AttentionArgs::order`: tiles of 128 queries, or
// pairs of tiles of 64, (b * Hq + h) * items_per_head + item.
struct WorkItems {
  int32_t per_head, tiles_per_item;
};
WorkItems work_items(const cuda::AttentionArgs& args, const cuda::Config& config);

// Shared memory of the kernel of a config, in bytes; 0: there is none.
int64_t shared_bytes(const cuda::Config& config, Dtype dtype);

}  // namespace permattn::sm90
