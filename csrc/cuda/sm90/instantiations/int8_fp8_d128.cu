#include "../instantiate.cuh"

PERMATTN_SM90_INSTANTIATE(kFloat32, kInt8, kFp8, 128, 64)
