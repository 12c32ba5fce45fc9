// Norm and rotary embedding of rows, out of core.prologue.pack_prologue's lists, in float32.
#pragma once
#include <optional>

#include "../common/quant.h"
#include "plan.h"

namespace permattn::binding {

const float* floats_of(const Tensor& x, const char* name, int64_t size);

inline const float* optional_floats_of(const std::optional<Tensor>& x, const char* name,
                                       int64_t size) {
  return x.has_value() ? floats_of(*x, name, size) : nullptr;
}

struct Heads {
  int64_t heads, dim;
};

// As many transforms as there are `sizes`; none of anything where the lists are empty.
std::vector<Transform> transforms_of(const std::vector<Tensor>& tensors,
                                     const std::vector<int64_t>& ints,
                                     const std::vector<double>& floats,
                                     const std::vector<Heads>& sizes);

// x and its transform; everything else is zeros.
PrepareParams source_of(const Tensor& x, const std::vector<Tensor>& prologue_tensors,
                        const std::vector<int64_t>& prologue_ints,
                        const std::vector<double>& prologue_floats);

// Fills what says which tokens count; `seen` is bool [1 or B, 1 or H, S], or nothing: all.
void add_seen(ColumnParams& columns, const std::optional<Tensor>& seen);

}  // namespace permattn::binding
