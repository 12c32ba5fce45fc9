// The choice of kernels, for the drivers of this folder.
#pragma once
#include "cpu.h"
#include "kernels.h"

namespace permattn::cpu {

// The functions of `isa`, and of the best one below it where it has none of its own.
Kernels select_kernels(Isa isa, Dtype dtype);

}  // namespace permattn::cpu
