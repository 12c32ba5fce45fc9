#include "../instantiate.cuh"

PERMATTN_SM90_INSTANTIATE(kFloat32, kInt8, kInt8, 64, 64)
