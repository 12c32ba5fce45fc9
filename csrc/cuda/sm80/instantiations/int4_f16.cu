// Attention by mma.sync: INT4 Q K^T, float16.
#include "../launch.cuh"

PERMATTN_INSTANTIATE_SM80(kFloat16, kInt4, kNone)
