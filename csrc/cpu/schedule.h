// Tiles of unequal cost over the threads of a pool, long ones first.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "cpu.h"
#include "kernels.h"

namespace permattn::cpu {

// Scratch memory that a thread keeps between calls: page faults would cost a small call its time.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  std::byte* reserve(size_t bytes) {
    if (bytes <= size_) return data_;
    std::free(data_);
    size_ = 0;
    data_ = static_cast<std::byte*>(std::aligned_alloc(64, (bytes + 4095) / 4096 * 4096));
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = bytes;
    return data_;
  }

  static Scratch& of_this_thread() {
    thread_local Scratch scratch;
    return scratch;
  }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Where the tiles of one order of slots begin and end. A tile lies inside one row block of every
// part, so that it has one list of each; the last entry is num_slots.
inline std::vector<int64_t> tile_bounds(int64_t num_slots, const std::vector<int64_t>& blocks) {
  std::vector<int64_t> bounds{0};
  for (int64_t at = 0; at < num_slots;) {
    int64_t next = std::min(at + kTileLanes, num_slots);
    for (const int64_t block : blocks) next = std::min(next, (at / block + 1) * block);
    bounds.push_back(next);
    at = next;
  }
  return bounds;
}

// Runs body(i, scratch) for i in [0, costs.size()), costly ones first; ties and near-ties keep
// their order, in which neighbours share keys. One shared counter: threads that fall behind take
// less.
template <class Body>
void run_tiles(const Pool& pool, const std::vector<int64_t>& costs, size_t scratch_bytes,
               const Body& body) {
  const auto count = static_cast<int64_t>(costs.size());
  if (count == 0) return;
  constexpr int64_t kLevels = 16;
  constexpr int64_t kWorthAThread = 1 << 16;  // in pairs of tokens: a few microseconds of work
  const int64_t highest = *std::max_element(costs.begin(), costs.end());
  int64_t total = 0;
  std::vector<int64_t> order(costs.size());
  std::vector<int64_t> begin(kLevels + 2, 0);
  const auto level = [&](int64_t i) {
    return kLevels - (highest > 0 ? costs[i] * kLevels / highest : 0);
  };
  for (int64_t i = 0; i < count; ++i) {
    total += costs[i];
    ++begin[level(i) + 1];
  }
  for (int64_t l = 0; l <= kLevels; ++l) begin[l + 1] += begin[l];
  for (int64_t i = 0; i < count; ++i) order[begin[level(i)]++] = i;

  struct Context {
    const std::vector<int64_t>& order;
    size_t scratch_bytes;
    const Body& body;
    std::atomic<int64_t> next{0};
  } context{order, scratch_bytes, body};
  const auto worker = [](void* raw, int64_t) {
    auto& shared = *static_cast<Context*>(raw);
    std::byte* scratch = Scratch::of_this_thread().reserve(shared.scratch_bytes);
    const auto tiles = static_cast<int64_t>(shared.order.size());
    for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < tiles;) {
      shared.body(shared.order[i], scratch);
    }
  };
  const int64_t workers = std::clamp<int64_t>(total / kWorthAThread, 1, pool.num_threads);
  if (workers == 1) {
    worker(&context, 0);
  } else {
    pool.run(workers, worker, &context);
  }
}

// Slots in the listed blocks of a row, for costs: bounded, whatever a damaged plan says.
inline int64_t row_slots(const IndexView& index, int64_t b, int64_t h, int64_t row) {
  constexpr int64_t kMost = int64_t{1} << 40;
  if (row >= index.num_full.size) return 0;
  const int32_t* offsets = index.row_offsets.row(b, h);
  const int64_t length = std::min<int64_t>(offsets[row + 1], index.indices.size) - offsets[row];
  return std::clamp<int64_t>(length, 0, kMost / index.block_col) * index.block_col;
}

}  // namespace permattn::cpu
