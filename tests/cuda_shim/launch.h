// A launch: blocks one after another, each with shared memory of its own that begins poisoned.
#pragma once
#include <cstdlib>

#include "builtins.h"
#include "record.h"

namespace shim {

inline char* stack_of(size_t thread) {
  static std::vector<char*> stacks;
  while (stacks.size() <= thread) {
    void* made = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<char*>(made));
  }
  return stacks[thread];
}

// Runs body() as every thread of a grid. Throws what a thread did wrong.
inline void launch(unsigned grid, int32_t threads, size_t shared_bytes,
                   const std::function<void()>& body) {
  constexpr size_t kAlignment = 1024;
  gridDim = {grid, 1, 1};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  observe::launch_begins();
  for (unsigned i = 0; i < grid; ++i) {
    Block now;
    block = &now;
    blockIdx = {i, 0, 0};
    void* shared = nullptr;
    // The exact size, so that AddressSanitizer sees the first byte behind it.
    if (posix_memalign(&shared, kAlignment, shared_bytes) != 0) throw std::bad_alloc();
    std::memset(shared, options.poison, shared_bytes);
    now.shared = static_cast<char*>(shared);
    now.shared_bytes = shared_bytes;
    now.body = body;
    now.live = threads;
    now.random = options.seed * 0x9E3779B97F4A7C15ULL + i;
    now.fibers.resize(threads);
    now.warps.resize((threads + 31) / 32);
    for (int32_t t = 0; t < threads; ++t) {
      start_fiber(now.fibers[t], t, stack_of(t));
      now.ready.push_back(t);
    }
    observe::block_begins(static_cast<int32_t>(i), threads, now.shared, shared_bytes);
    run_fibers();
    observe::block_ends();
    std::free(shared);
    block = nullptr;
    if (!now.fault.empty()) {
      throw std::runtime_error("block " + std::to_string(i) + ": " + now.fault);
    }
  }
}

// As launch; what a thread did wrong, or null.
inline const char* try_launch(unsigned grid, int32_t threads, size_t shared_bytes,
                              const std::function<void()>& body) {
  static std::string what;
  try {
    launch(grid, threads, shared_bytes, body);
  } catch (const std::exception& error) {
    what = error.what();
    return what.c_str();
  }
  return nullptr;
}

// The same for kernel(args), which is recorded or run or both.
template <class Args>
const char* try_launch(void (*kernel)(Args), unsigned grid, int32_t threads, size_t shared_bytes,
                       const Args& args) {
  if (refusal() != nullptr) return refusal();
  if (options.records) {
    record_launch(symbol_of(reinterpret_cast<const void*>(kernel)).c_str(),
                  static_cast<int32_t>(grid), threads, static_cast<int64_t>(shared_bytes), &args,
                  sizeof(args));
  }
  if (!options.runs) return nullptr;
  return try_launch(grid, threads, shared_bytes, [&] { kernel(args); });
}

}  // namespace shim
