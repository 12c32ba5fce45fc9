// Items of work by the keys that they look at, the longest first: a stable sort by digits of one
// block of threads, as there are no more tiles than tens of thousands.
#pragma once
#include "lists.cuh"

namespace permattn::index {

using permute::add_to;

constexpr int32_t kDigitBits = 8, kDigits = 1 << kDigitBits;
// Counts of digits of every warp, and where the next of each digit goes.
constexpr int32_t kOrderShared = (kSumThreads / 32 + 1) * kDigits * 4;

struct OrderArgs {
  cuda::AttentionArgs a;
  int32_t lanes_per_step;  // divides what every entry of a list stands for
  int32_t passes;
  int32_t* order;
  uint32_t* scratch;  // [3][items of all heads]
};

// The order of lengths, turned round.
PERMATTN_DEVICE uint32_t order_key(const OrderArgs& args, int32_t at) {
  const cuda::AttentionArgs& a = args.a;
  const int32_t of_head = cuda::items_per_head(a);
  const int32_t item = at % of_head, head = at / of_head;
  uint32_t steps = 0;
  for (int32_t tile = item * a.tiles_per_item;
       tile < a.num_tiles && tile < (item + 1) * a.tiles_per_item; ++tile) {
    const int32_t first = tile / a.tiles_per_unit * a.unit;
    for (int32_t i = 0; i < a.num_parts; ++i) {
      const auto& part = a.parts[i];
      const int32_t* offsets = part.row_offsets.row(head / a.q_heads, head % a.q_heads);
      const int32_t row = first / part.block_q;
      steps += static_cast<uint32_t>(offsets[row + 1] - offsets[row]) *
               static_cast<uint32_t>(part.block_kv / args.lanes_per_step);
    }
  }
  return ~steps;
}

// Lanes that hold the same digit as this one.
PERMATTN_DEVICE uint32_t peers_of(uint32_t digit, bool is_there) {
  uint32_t peers = ptx::ballot(is_there);
#pragma unroll
  for (int bit = 0; bit < kDigitBits; ++bit) {
    const bool is_set = (digit >> bit & 1U) != 0;
    const uint32_t set = ptx::ballot(is_set);
    peers &= is_set ? set : ~set;
  }
  return peers;
}

// Where the first of every digit goes.
PERMATTN_DEVICE void find_starts(const uint32_t* keys, int32_t count, int32_t shift,
                                 uint32_t* starts) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (thread < kDigits) starts[thread] = 0;
  __syncthreads();
  for (int32_t at = thread; at < count; at += kSumThreads) {
    add_to(starts + (keys[at] >> shift) % kDigits, 1);
  }
  __syncthreads();
  if (thread < 32) {
    constexpr int32_t kOwn = kDigits / 32;
    uint32_t own[kOwn];
    int32_t all = 0;
#pragma unroll
    for (int32_t i = 0; i < kOwn; ++i) {
      own[i] = starts[thread * kOwn + i];
      all += static_cast<int32_t>(own[i]);
    }
    auto next = static_cast<uint32_t>(sum_up_to_lane(all, thread) - all);
#pragma unroll
    for (int32_t i = 0; i < kOwn; ++i) {
      starts[thread * kOwn + i] = next;
      next += own[i];
    }
  }
  __syncthreads();
}

// One pass: items move to where their digit stands, equals in the order they have.
PERMATTN_DEVICE void sort_by_digit(const uint32_t* keys, const uint32_t* items, uint32_t* to_keys,
                                   uint32_t* to_items, int32_t count, int32_t shift,
                                   uint32_t* shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t lane = thread % 32, warp = thread / 32;
  uint32_t* starts = shared;
  uint32_t* of_warp = shared + kDigits;  // [warps][kDigits]
  find_starts(keys, count, shift, starts);
  for (int32_t first = 0; first < count; first += kSumThreads) {
    for (int32_t i = thread; i < kSumThreads / 32 * kDigits; i += kSumThreads) of_warp[i] = 0;
    __syncthreads();
    const bool is_there = first + thread < count;
    const uint32_t key = is_there ? keys[first + thread] : 0;
    const uint32_t item = is_there ? items[first + thread] : 0;
    const uint32_t digit = (key >> shift) % kDigits;
    const uint32_t peers = peers_of(digit, is_there);
    const int32_t rank = count_bits(peers & ((1U << lane) - 1U));
    if (is_there && rank == 0) {
      of_warp[warp * kDigits + digit] = static_cast<uint32_t>(count_bits(peers));
    }
    __syncthreads();
    if (thread < kDigits) {
      uint32_t next = starts[thread];
      for (int32_t i = thread; i < kSumThreads / 32 * kDigits; i += kDigits) {
        const uint32_t own = of_warp[i];
        of_warp[i] = next;
        next += own;
      }
      starts[thread] = next;
    }
    __syncthreads();
    if (is_there) {
      const uint32_t place = of_warp[warp * kDigits + digit] + static_cast<uint32_t>(rank);
      to_keys[place] = key;
      to_items[place] = item;
    }
    __syncthreads();
  }
}

PERMATTN_DEVICE void swap(uint32_t*& a, uint32_t*& b) {
  uint32_t* was = a;
  a = b;
  b = was;
}

PERMATTN_DEVICE void order_items(const OrderArgs& args, char* shared) {
  const int32_t count = args.a.batch * args.a.q_heads * cuda::items_per_head(args.a);
  uint32_t *keys = args.scratch, *to_keys = keys + count, *items = keys + 2 * count;
  auto* to_items = reinterpret_cast<uint32_t*>(args.order);
  // The last pass writes to `order`.
  if (args.passes % 2 == 0) swap(items, to_items);
  for (auto at = static_cast<int32_t>(threadIdx.x); at < count; at += kSumThreads) {
    keys[at] = order_key(args, at);
    items[at] = static_cast<uint32_t>(at);
  }
  __syncthreads();
  for (int32_t pass = 0; pass < args.passes; ++pass) {
    sort_by_digit(keys, items, to_keys, to_items, count, pass * kDigitBits,
                  reinterpret_cast<uint32_t*>(shared));
    swap(keys, to_keys);
    swap(items, to_items);
  }
}

}  // namespace permattn::index
