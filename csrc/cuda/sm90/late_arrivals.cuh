// Arrivals at barriers for copies that threads make themselves (cp.async).
#pragma once
#include "../primitives/mbarrier.cuh"

namespace permattn::sm90 {

// Each operation is announced once two more are under way, or when somebody may be waiting for it.
// Barriers are named by their place in an array; -1: none.
class LateArrivals {
 public:
  // After the copies of an operation were asked for, if any: `barrier` waits for them.
  PERMATTN_DEVICE void add(uint64_t* barriers, int32_t barrier) {
    ptx::cp_async_commit();
    if (older_ >= 0) {
      ptx::cp_async_wait<2>();
      announce(barriers, older_);
    }
    older_ = newer_;
    newer_ = barrier;
  }

  PERMATTN_DEVICE void flush(uint64_t* barriers) {
    if (older_ < 0 && newer_ < 0) return;
    ptx::cp_async_wait<0>();
    if (older_ >= 0) announce(barriers, older_);
    if (newer_ >= 0) announce(barriers, newer_);
    older_ = newer_ = -1;
  }

 private:
  int32_t older_ = -1, newer_ = -1;

  PERMATTN_DEVICE static void announce(uint64_t* barriers, int32_t barrier) {
    ptx::fence_async_proxy();
    ptx::mbarrier_arrive(barriers + barrier);
  }
};

}  // namespace permattn::sm90
