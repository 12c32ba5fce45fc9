// Test only: CUDA C++ kernels on a CPU. Kernel sources include it through primitives/platform.cuh
// where they are not compiled by nvcc.
#pragma once
#include <cmath>

// What a kernel calls. g++ does not instrument the store of a struct that a call returns, so
// nothing is called where every access must be seen.
#if defined(PERMATTN_SHIM_CHECKED)
#define SHIM_DEVICE inline __attribute__((always_inline))
#else
#define SHIM_DEVICE inline
#endif

#include "fibers.h"
//
#include "builtins.h"
#include "collectives.h"
#include "copies.h"
#include "launch.h"
#include "matrices.h"
#include "numbers.h"
