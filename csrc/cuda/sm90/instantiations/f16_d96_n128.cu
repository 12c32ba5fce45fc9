#include "../instantiate.cuh"

PERMATTN_SM90_INSTANTIATE(kFloat16, kNone, kNone, 96, 128)
