// Test only: CUDA C++ kernels on a CPU. Kernel sources include it through primitives/platform.cuh
// where they are not compiled by nvcc.
#pragma once
#include <cmath>

#include "fibers.h"
//
#include "builtins.h"
#include "collectives.h"
#include "copies.h"
#include "launch.h"
#include "matrices.h"
#include "numbers.h"
