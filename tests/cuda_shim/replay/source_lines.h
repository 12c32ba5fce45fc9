// Lines of the source by addresses of the code.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace permattn_shim {

// Of an address and those that it was called from, the first line that is no stand-in's: where a
// kernel is. `addr2line` looks it up; where there is none, the address is told.
std::string source_line(const std::vector<uintptr_t>& addresses);

}  // namespace permattn_shim
