// Attention by mma.sync: INT8 Q K^T and P V.
#include "../launch.cuh"

PERMATTN_INSTANTIATE_SM80(kFloat32, kInt8, kInt8)
