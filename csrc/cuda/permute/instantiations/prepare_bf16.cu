// Rows of x in bfloat16, made ready.
#include "../instantiate.cuh"

PERMATTN_INSTANTIATE_PREPARE(permattn::Dtype::kBFloat16)
