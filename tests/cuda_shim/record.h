// Launches of kernels that only hardware, or a simulator of its instructions, can run.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace shim {

struct Recorded {
  std::string kernel;  // which one, as its launcher names it
  int32_t blocks, threads;
  int64_t shared_bytes;
  std::string parameters;  // bytes
};

inline std::vector<Recorded> recorded;
// Of the device that launches are made for.
inline int32_t recorded_processors = 132;

inline void record_launch(const char* kernel, int32_t blocks, int32_t threads, int64_t shared_bytes,
                          const void* parameters, size_t parameter_bytes) {
  recorded.push_back({kernel, blocks, threads, shared_bytes,
                      std::string(static_cast<const char*>(parameters), parameter_bytes)});
}

}  // namespace shim
