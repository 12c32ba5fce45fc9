// Attention by mma.sync: INT8 Q K^T, bfloat16.
#include "../launch.cuh"

PERMATTN_INSTANTIATE_SM80(kBFloat16, kInt8, kNone)
