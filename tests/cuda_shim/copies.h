// cp.async: lands when its group is waited for, or at once (`Options::eager`). A kernel that
// forgets to wait is wrong in the first mode, one that overwrites what is still read in the second.
#pragma once
#include "fibers.h"

namespace shim {

inline void check_shared(const void* p, size_t bytes, const char* what) {
  const auto* at = static_cast<const char*>(p);
  if (at < block->shared || at + bytes > block->shared + block->shared_bytes) {
    fail(std::string(what) + " outside shared memory");
  }
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(std::string(what) + " is misaligned");
}

inline void land(const Copy& copy) {
  observe::goes_on(-1);
  std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(static_cast<char*>(copy.to) + copy.valid, 0, 16 - copy.valid);
  observe::goes_on(block->current->thread);
}

inline void finish(const Copy& copy) {
  if (!options.eager) land(copy);
  observe::copy_ends(copy.to);
}

inline void cp_async_16(void* to, const void* from, int32_t valid) {
  check_shared(to, 16, "cp.async");
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("the source of cp.async is misaligned");
  if (valid < 0 || valid > 16) fail("cp.async of " + std::to_string(valid) + " bytes");
  const Copy copy{to, from, valid};
  observe::copy_begins(to, from, static_cast<size_t>(valid));
  if (options.eager) land(copy);
  block->current->open.push_back(copy);
}

inline void cp_async_commit() {
  Fiber& fiber = *block->current;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

template <int kPending>
void cp_async_wait() {
  if (block->current->waits++ == options.left_out.wait) return;
  auto& groups = block->current->groups;
  while (static_cast<int>(groups.size()) > kPending) {
    for (const Copy& copy : groups.front()) finish(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace shim
