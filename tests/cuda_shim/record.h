// Launches of kernels that only hardware, or a simulator of its instructions, can run.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace shim {

struct Recorded {
  std::string kernel;  // which one, as its launcher names it
  int32_t blocks, threads;
  int64_t shared_bytes;
  std::string parameters;  // bytes
};

inline std::vector<Recorded> recorded;
// Where it is set, launches go there while all that they point at is alive, and are not kept.
inline std::function<void(const Recorded&)> run_launch;
// Of the device that launches are made for.
inline int32_t recorded_processors = 132;

inline void record_launch(const char* kernel, int32_t blocks, int32_t threads, int64_t shared_bytes,
                          const void* parameters, size_t parameter_bytes) {
  Recorded launch{kernel, blocks, threads, shared_bytes,
                  std::string(static_cast<const char*>(parameters), parameter_bytes)};
  if (run_launch) {
    run_launch(launch);
  } else {
    recorded.push_back(std::move(launch));
  }
}

}  // namespace shim
