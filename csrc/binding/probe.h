// The tensors of a probe as plain structs, for every device.
#pragma once
#include <optional>

#include "plan.h"

namespace permattn::binding {

// See core.probe.ProbeArgs; what is written is contiguous, diagonal zeros on entry.
struct ProbeTensors {
  const Tensor &q, &k, &first_position, &first_coordinate, &key_range;
  const std::optional<Tensor>&order, &skip;
  bool lse_is_given;
  const Tensor &lse, &column, &square, &diagonal;
};

// `most`: rows that a kernel takes.
ProbeParams probe_params_of(const ProbeTensors& x, int64_t most);

}  // namespace permattn::binding
