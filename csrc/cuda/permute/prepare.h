// Rows made ready on a GPU: the numbers of core.quant.quantise to the last bit. Every function
// returns why nothing was launched, or null.
#pragma once
#include "../../common/quant.h"

namespace permattn::cuda {

// Rows that may share a scale: they lie in the registers of one block.
constexpr int64_t kMaxRowsPerScale = 128;

// Whether a norm looks across heads: token_stats must then be what launch_token_statistics makes.
constexpr bool needs_token_stats(const PrepareParams& p) {
  return p.transform.across_heads && p.transform.norm != Transform::Norm::kNone;
}

// Layouts kRows, kNibbleRows and kFragments; dots need no fewer orders than heads. One reading of
// x, one writing of the rows. `capability` is major * 10 + minor.
const char* launch_prepare(const PrepareParams& params, int capability, void* stream);

// float32 [B, S, 2], the params' token_stats.
const char* launch_token_statistics(const PrepareParams& params, float* stats, void* stream);

// Floats of scratch that launch_column_statistics wants.
int64_t column_scratch(const ColumnParams& params);

// Two stages in a fixed order: two runs make the same bits.
const char* launch_column_statistics(const ColumnParams& params, float* scratch, void* stream);

}  // namespace permattn::cuda
