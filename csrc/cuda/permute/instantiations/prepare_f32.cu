// Rows of x in float32, made ready.
#include "../instantiate.cuh"

PERMATTN_INSTANTIATE_PREPARE(permattn::Dtype::kFloat32)
