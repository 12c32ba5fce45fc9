// Attention by mma.sync: float16.
#include "../launch.cuh"

PERMATTN_INSTANTIATE_SM80(kFloat16, kNone, kNone)
