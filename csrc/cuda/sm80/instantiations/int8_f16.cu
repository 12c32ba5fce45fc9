// Attention by mma.sync: INT8 Q K^T, float16.
#include "../launch.cuh"

PERMATTN_INSTANTIATE_SM80(kFloat16, kInt8, kNone)
