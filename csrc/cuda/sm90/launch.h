// The host side of the kernels for sm_90a.
#pragma once
#include "../attend.h"

namespace permattn::sm90 {

// Shared memory of the kernel of a config, in bytes; 0: there is none.
int64_t shared_bytes(const cuda::Config& config, Dtype dtype);

}  // namespace permattn::sm90
