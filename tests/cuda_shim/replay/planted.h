// Kernels with one fault each, that the checks must see.
#pragma once
#include <string>
#include <vector>

namespace replay {

std::vector<std::string> planted_names();

// Runs one; what the stand-in itself found wrong with it, or null.
const char* run_planted(const std::string& name);

}  // namespace replay
