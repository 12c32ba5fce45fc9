#include "../instantiate.cuh"

PERMATTN_SM90_INSTANTIATE(kBFloat16, kInt8, kNone, 128, 64)
