#include "../instantiate.cuh"

PERMATTN_SM90_INSTANTIATE(kFloat16, kNone, kNone, 128, 128)
