// Attention by mma.sync: bfloat16.
#include "../launch.cuh"

PERMATTN_INSTANTIATE_SM80(kBFloat16, kNone, kNone)
