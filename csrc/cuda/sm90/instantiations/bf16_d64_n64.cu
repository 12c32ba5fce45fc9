#include "../instantiate.cuh"

PERMATTN_SM90_INSTANTIATE(kBFloat16, kNone, kNone, 64, 64)
