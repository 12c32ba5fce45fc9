// Whole passes with kernels that were chosen before.
#pragma once
#include <memory>

#include "cpu.h"
#include "kernels.h"

namespace permattn::cpu {

// Runs kernels.forward over every tile of the plan.
void run_plan(const FwdParams& params, const Kernels& kernels, size_t scratch_bytes,
              const Pool& pool);

void prepare_with(const PrepareParams& params, const Kernels& kernels, const Pool& pool);

}  // namespace permattn::cpu
