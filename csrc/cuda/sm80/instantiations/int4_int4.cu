// Attention by mma.sync: INT4 Q K^T and P V.
#include "../launch.cuh"

PERMATTN_INSTANTIATE_SM80(kFloat32, kInt4, kInt4)
