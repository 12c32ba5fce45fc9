// Launches as they were asked for, to be run by something else: a simulator of instructions, or
// code that is compiled with checks. Kernels that cannot run here are always recorded.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace shim {

struct Recorded {
  std::string kernel;  // its symbol, or what its launcher names it
  int32_t blocks, threads;
  int64_t shared_bytes;
  std::string parameters;  // bytes
};

inline std::vector<Recorded> recorded;
// Where it is set, launches go there while all that they point at is alive, and are not kept.
inline std::function<void(const Recorded&)> run_launch;
// Of the device that launches are made for.
inline int32_t recorded_processors = 132;

// What the linker calls a function that is visible outside of its library.
inline std::string symbol_of(const void* function) {
  Dl_info found{};
  if (dladdr(function, &found) == 0 || found.dli_sname == nullptr || found.dli_saddr != function) {
    throw std::logic_error("a kernel has no visible symbol");
  }
  return found.dli_sname;
}

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
