// Rows of x in float16, made ready.
#include "../instantiate.cuh"

PERMATTN_INSTANTIATE_PREPARE(permattn::Dtype::kFloat16)
