#include "../instantiate.cuh"

PERMATTN_SM90_INSTANTIATE(kFloat16, kInt8, kNone, 128, 64)
