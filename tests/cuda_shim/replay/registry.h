// Kernels of the replay program by their symbols, as the Python module records them.
#pragma once
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "cuda/primitives/platform.cuh"

namespace replay {

struct Launch {
  std::string kernel;
  uint32_t blocks = 0;
  int32_t threads = 0;
  uint64_t shared_bytes = 0;
  std::string parameters;  // bytes
};

// What a thread did wrong, or null.
using Runner = std::function<const char*(const Launch&)>;

class Registry {
 public:
  template <class Args>
  void add(void (*kernel)(Args)) {
    runners_[shim::symbol_of(reinterpret_cast<const void*>(kernel))] = [kernel](const Launch& l) {
      if (l.parameters.size() != sizeof(Args)) {
        throw std::invalid_argument(l.kernel + ": wants " + std::to_string(sizeof(Args)) +
                                    " bytes of parameters, got " +
                                    std::to_string(l.parameters.size()));
      }
      Args args;
      std::memcpy(&args, l.parameters.data(), sizeof(args));
      return shim::try_launch(kernel, l.blocks, l.threads, l.shared_bytes, args);
    };
  }

  const Runner& find(const std::string& kernel) const {
    const auto found = runners_.find(kernel);
    if (found == runners_.end()) throw std::invalid_argument("not compiled in: " + kernel);
    return found->second;
  }

 private:
  std::map<std::string, Runner> runners_;
};

// Each in a file of its own, so that they compile side by side.
void add_attention_16(Registry& registry);
void add_attention_small(Registry& registry);
void add_prepare(Registry& registry);
void add_index(Registry& registry);
void add_probe(Registry& registry);

}  // namespace replay
