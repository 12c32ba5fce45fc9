// The warpgroup that feeds the two others: queries of an item, then keys and values tile by tile.
#pragma once
#include "../device/rows.cuh"
#include "../primitives/tma.cuh"
#include "../primitives/warpgroup.cuh"
#include "key_walk.cuh"
#include "late_arrivals.cuh"

namespace permattn::sm90 {

constexpr int kFeedThreads = ptx::kWarpgroupThreads;
constexpr int kFeedBarrier = 1;
static_assert(kFeedThreads == kHalves * kHalfRows);
using device::kChunkBytes;
// No tensor has so many rows: boxes that begin here are zeros.
constexpr int32_t kNowhere = 1 << 30;

// device::copy_rows with a loop in place of constants, as this warpgroup has few registers: copies
// Layout's rows asynchronously. address(row): where a row begins; null: it is zeros, as are
// bytes past row_bytes. Threads stand on rows of one panel after the other: a thread's rows are
// swizzled alike.
template <class Layout, class Address>
PERMATTN_DEVICE void copy_rows(char* tile, int32_t thread, int32_t row_bytes, const void* anywhere,
                               const Address& address) {
  constexpr int kPanelBytes = Layout::kPanelBytes;
  constexpr int kChunks = kPanelBytes / kChunkBytes;
  constexpr int kAtOnce = kFeedThreads / kChunks;  // rows
  static_assert(kAtOnce % 8 == 0);
  thread = ptx::here(thread);
  const int32_t byte = thread % kChunks * kChunkBytes;
  int32_t row = thread / kChunks;
  char* to = tile + Layout::offset(row, byte);
#pragma unroll 1
  for (; row < Layout::kRows; row += kAtOnce) {
    const char* from = address(row);
#pragma unroll
    for (int at = 0; at < Layout::kRowBytes; at += kPanelBytes) {
      const int32_t left =
          from == nullptr ? 0 : device::clamp(row_bytes - at - byte, 0, kChunkBytes);
      ptx::cp_async_16(to + at * Layout::kRows, left > 0 ? from + at + byte : anywhere, left);
    }
    to += kAtOnce * kPanelBytes;
  }
}

template <class T>
class Feed {
 public:
  using Books = typename T::Books;
  using Tile = KeyTile<T::kBlockN>;

  PERMATTN_DEVICE Feed(const LaunchArgs& launch, char* shared, int32_t thread)
      : launch_(launch),
        args_(launch.attention),
        shared_(shared),
        books_(*reinterpret_cast<Books*>(shared + T::kBooksOffset)),
        thread_(thread) {}

  PERMATTN_DEVICE void run() {
    uint32_t parity = 1;
#pragma unroll 1
    for (auto i = static_cast<int32_t>(blockIdx.x); i < launch_.num_items;
         i += static_cast<int32_t>(gridDim.x)) {
      wait_empty(T::kEmptyQ, parity);
      parity ^= 1;
      feed_item(i);
    }
    late_.flush(books_.barriers);
  }

 private:
  const LaunchArgs& launch_;
  const AttentionArgs& args_;
  char* shared_;
  Books& books_;
  int32_t thread_;
  LateArrivals late_;
  Turn<T::kStages> turn_;
  int32_t ring_ = 0;

  PERMATTN_DEVICE static void sync() { ptx::named_barrier<kFeedBarrier, kFeedThreads>(); }

  PERMATTN_DEVICE void wait_empty(int32_t barrier, uint32_t parity) {
    if (ptx::mbarrier_test(books_.barriers + barrier, parity)) return;
    // The others may be waiting for what has not been announced.
    late_.flush(books_.barriers);
    ptx::mbarrier_wait(books_.barriers + barrier, parity);
  }

  PERMATTN_DEVICE void feed_item(int32_t i) {
    const bool is_shared = args_.tiles_per_item == 1;
    describe(i, is_shared);
    sync();
    bool has_keys = false;
#pragma unroll 1
    for (int n = 0; n < 2 * args_.num_parts; ++n) {
      has_keys = has_keys || books_.lists[0][n].count > 0 || books_.lists[1][n].count > 0;
    }
    if (thread_ == 0) books_.has_keys = has_keys;
    feed_queries();
    const int32_t halves =
        int32_t(books_.halves[0].num_rows > 0) | int32_t(books_.halves[1].num_rows > 0) << 1;
    KeyWalk<T> walk(args_, books_, thread_, halves, is_shared);
    bool is_there = walk.fetch();
#pragma unroll 1
    while (is_there) {
      Tile& tile = books_.tiles[ring_];
      walk.write(tile);
      is_there = walk.fetch();
      if (thread_ == 0) tile.is_last = !is_there;
      sync();
      const bool is_seen = tile.is_seen(0) || tile.is_seen(1);
      feed_keys(tile, is_seen);
      feed_values(tile, is_seen);
      turn_.advance();
      ring_ = ring_ == T::kRing - 1 ? 0 : ring_ + 1;
    }
    // The next item writes over what other threads of the feed may still read.
    sync();
  }

  // What the books hold of an item.
  PERMATTN_DEVICE void describe(int32_t i, bool is_shared) {
    const int32_t half = thread_ / kHalfRows, row = thread_ % kHalfRows;
    const device::QueryTile mine = half_tile(launch_, i, half);
    const int32_t token = device::query_token(args_, mine, row);
    books_.q_tokens[thread_] = token;
    // -1 is no lowest token.
    const uint32_t low = __reduce_min_sync(~0U, static_cast<uint32_t>(token) & 0x7FFFFFFFU);
    const int32_t high = __reduce_max_sync(~0U, token);
    if (thread_ % 32 == 0) books_.warp_spans[thread_ / 32] = {static_cast<int32_t>(low), high};
    if (row == 0) books_.halves[half] = mine;
    if (row < args_.num_parts) {
      const PartArgs& part = args_.parts[row];
      PartHead head{};
      if (mine.num_rows > 0) head = device::part_head<T::kQk, T::kPv>(args_, mine, row);
      const bool is_read = half == 0 || !is_shared;
      for (int partial = 0; partial < 2; ++partial) {
        books_.lists[half][2 * row + partial] = {
            head.entries + (partial != 0 ? head.num_entries[0] : 0),
            is_read ? head.num_entries[partial] : 0};
      }
      if (half == 0) {
        const PartMaps& maps = launch_.maps[row];
        const int32_t k_h = mine.h / (args_.q_heads / part.k_heads);
        const int32_t v_h = mine.h / (args_.q_heads / part.v_heads);
        const int32_t groups =
            T::kQuantisedPv ? (part.num_slots + args_.kv_rows - 1) / args_.kv_rows : 0;
        books_.parts[row] = {head.k,
                             head.v,
                             head.k_scale,
                             head.v_scale,
                             head.kv_token,
                             head.num_blocks,
                             maps.k_moves_h ? k_h : 0,
                             maps.k_moves_b ? mine.b : 0,
                             maps.v_moves_h ? v_h : 0,
                             maps.v_moves_b ? mine.b : 0,
                             (mine.b * part.v_heads + v_h) * groups};
      }
    }
    sync();
    if (thread_ < kHalves) {
      const device::TokenSpan a = books_.warp_spans[2 * thread_],
                              b = books_.warp_spans[2 * thread_ + 1];
      books_.spans[thread_] = {min(a.low, b.low), max(a.high, b.high)};
    }
  }

  PERMATTN_DEVICE void feed_queries() {
    constexpr int kBytes = T::kQuantisedQk ? 1 : 2;
    const device::QueryTile first = books_.halves[0];
    const char* base = static_cast<const char*>(args_.q.data) +
                       (first.b * args_.q.stride_b + first.h * args_.q.stride_h) * kBytes;
    char* tiles = shared_ + T::kQOffset;
#pragma unroll 1
    for (int half = 0; half < kHalves; ++half) {
      const int32_t slot = books_.halves[half].first_slot;
      copy_rows<typename T::QLayout>(
          tiles + half * T::QLayout::kBytes, thread_, args_.head_dim * kBytes, base,
          [&](int row) -> const char* {
            const int32_t token = books_.q_tokens[half * kHalfRows + row];
            if (token < 0) return nullptr;
            return base + (T::kQuantisedQk ? slot + row : token) * args_.q.stride_s * kBytes;
          });
    }
    if (args_.scale_log2 < 0.0F) negate_queries(tiles);
    late_.add(books_.barriers, T::kFullQ);
  }

  PERMATTN_DEVICE void negate_queries(char* tiles) {
    ptx::cp_async_commit();
    late_.flush(books_.barriers);
    ptx::cp_async_wait<0>();
    sync();
    device::negate_queries<T::kQk, kFeedThreads, kHalves * T::QLayout::kBytes>(thread_, tiles);
  }

  // Boxes of consecutive slots, panel by panel, by one warp.
  template <class Layout, int kElementBytes>
  PERMATTN_DEVICE void copy_boxes(char* to, const cuda::TensorMap& map, uint64_t* barrier,
                                  const Tile& tile, int32_t box_rows, int32_t h, int32_t b) {
    constexpr int kPanels = Layout::kRowBytes / Layout::kPanelBytes;
    constexpr int kElements = Layout::kPanelBytes / kElementBytes;
    const int32_t lane = ptx::here(thread_);
    if (lane >= 32) return;
    if (lane == 0) ptx::mbarrier_expect(barrier, Layout::kBytes);
    __syncwarp();
    constexpr int kBoxesAtOnce = 32 / kPanels;
    const int32_t panel = lane % kPanels;
    if (lane >= kBoxesAtOnce * kPanels) return;
#pragma unroll 1
    for (int32_t row = lane / kPanels * box_rows; row < T::kBlockN;
         row += kBoxesAtOnce * box_rows) {
      const int32_t slot = tile.slot[row];
      ptx::tma_load_4d(to + (panel * T::kBlockN + row) * Layout::kPanelBytes, &map, barrier,
                       panel * kElements, slot < 0 ? kNowhere : slot, h, b);
    }
  }

  template <class Layout>
  PERMATTN_DEVICE void copy_lanes(char* to, const Tile& tile, bool in_slots, const char* base,
                                  int64_t stride, int32_t row_bytes) {
    copy_rows<Layout>(to, thread_, row_bytes, base, [&](int row) -> const char* {
      const int32_t token = max(tile.token[0][row], tile.token[1][row]);
      return token < 0 ? nullptr : base + (in_slots ? tile.slot[row] : token) * stride;
    });
  }

  PERMATTN_DEVICE void feed_keys(const Tile& tile, bool is_seen) {
    constexpr int kBytes = T::kQuantisedQk ? 1 : 2;
    wait_empty(T::kEmptyK + turn_.stage, turn_.parity ^ 1);
    uint64_t* full = books_.barriers + T::kFullK + turn_.stage;
    char* to = shared_ + T::kKOffset + turn_.stage * T::kKBytes;
    const PartArgs& part = args_.parts[tile.part];
    const PartMaps& maps = launch_.maps[tile.part];
    const PartPlace& place = books_.parts[tile.part];
    bool is_late = false;
    if (is_seen && maps.has_k) {
      // Lanes that nobody sees are hidden from every row, whatever their scores are.
      copy_boxes<typename T::KLayout, kBytes>(to, maps.k, full, tile, maps.box_rows, place.k_map_h,
                                              place.k_map_b);
    } else if (is_seen) {
      copy_lanes<typename T::KLayout>(to, tile, T::kQuantisedQk || part.k_in_slots, place.k,
                                      part.k.stride_s * kBytes, args_.head_dim * kBytes);
      is_late = true;
    }
    if (!is_late) ptx::mbarrier_arrive(full);
    late_.add(books_.barriers, is_late ? T::kFullK + turn_.stage : -1);
  }

  PERMATTN_DEVICE void feed_values(const Tile& tile, bool is_seen) {
    wait_empty(T::kEmptyV + turn_.stage, turn_.parity ^ 1);
    uint64_t* full = books_.barriers + T::kFullV + turn_.stage;
    char* to = shared_ + T::kVOffset + turn_.stage * T::kVStride;
    const PartArgs& part = args_.parts[tile.part];
    const PartMaps& maps = launch_.maps[tile.part];
    const PartPlace& place = books_.parts[tile.part];
    bool is_late = false;
    if constexpr (T::kQuantisedPv) {
      if (is_seen) feed_small_values(tile, full, to);
      is_late = is_seen;
    } else if (is_seen && maps.has_v && !tile.has_hidden()) {
      copy_boxes<typename T::VLayout, 2>(to, maps.v, full, tile, maps.box_rows, place.v_map_h,
                                         place.v_map_b);
    } else if (is_seen) {
      copy_lanes<typename T::VLayout>(to, tile, part.v_in_slots, place.v, part.v.stride_s * 2,
                                      args_.head_dim_v * 2);
      is_late = true;
    }
    if (!is_late) ptx::mbarrier_arrive(full);
    late_.add(books_.barriers, is_late ? T::kFullV + turn_.stage : -1);
  }

  // One group: its numbers, and the scales of its columns.
  PERMATTN_DEVICE void feed_small_values(const Tile& tile, uint64_t* full, char* to) {
    const PartPlace& place = books_.parts[tile.part];
    const PartMaps& maps = launch_.maps[tile.part];
    const int64_t column = static_cast<int64_t>(tile.group) * args_.head_dim_v;
    if (maps.has_v) {
      if (thread_ == 0) {
        ptx::mbarrier_expect(full, T::VLayout::kBytes);
        ptx::tma_load_3d(to, &maps.v, full, 0, 0, place.v_map_group + tile.group);
      }
    } else {
      const char* base = place.v + column * T::kBlockN;
      copy_rows<typename T::VLayout>(to, thread_, T::kBlockN, place.v, [&](int row) -> const char* {
        return row < args_.head_dim_v ? base + row * T::kBlockN : nullptr;
      });
    }
    constexpr int kFloats = kChunkBytes / 4;
    if (thread_ < T::kDim / kFloats) {
      const bool is_there = thread_ * kFloats < args_.head_dim_v;
      ptx::cp_async_16(to + T::kVScaleOffset + thread_ * kChunkBytes,
                       place.v_scale + (is_there ? column + thread_ * kFloats : 0),
                       is_there ? kChunkBytes : 0);
    }
  }
};

}  // namespace permattn::sm90
