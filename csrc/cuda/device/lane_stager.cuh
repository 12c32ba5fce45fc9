// Lanes of key tiles, staged ahead of the loads of their rows: entry -> slot -> token -> shared
// memory.
#pragma once
#include "../primitives/numbers.cuh"
#include "part_head.cuh"

namespace permattn::device {

// What shared memory holds of one tile of keys.
template <int kBlockN>
struct LaneTile {
  int32_t token[kBlockN];  // -1: no query of the tile sees the lane, and its rows are not read
  int32_t slot[kBlockN];
  float scale[kBlockN];         // of K, by group of slots
  uint32_t seen[kBlockN / 32];  // bit by lane
  int32_t list;                 // 2 * part + (1: partial)
  int32_t group;                // of the first slot; -1: there is none

  PERMATTN_DEVICE bool has_holes() const {
    uint32_t all = ~0U;
#pragma unroll
    for (int i = 0; i < kBlockN / 32; ++i) all &= seen[i];
    return all != ~0U;
  }
};

// The facts of a tile of queries that a lane is judged by.
struct QueryTokens {
  const int32_t* tokens;  // shared memory, [block_m]
  int32_t block_m;
  TokenSpan span;
  bool in_order;  // tokens follow each other
};

// Whether some query of the tile sees a key. One bound needs only the lowest or highest token, and
// so do both where tokens follow each other; two bounds out of order need a look at every one.
PERMATTN_DEVICE bool some_query_sees(const QueryTokens& queries, int32_t token,
                                     const PartArgs& part) {
  if (part.band.empty) return false;
  if (part.two_bounds && !queries.in_order) {
    bool seen = false;
    for (int row = 0; row < queries.block_m; ++row) {
      const int32_t query = queries.tokens[row];
      seen = seen || (query >= 0 && token_is_seen(static_cast<uint32_t>(query),
                                                  static_cast<uint32_t>(token), part.band));
    }
    return seen;
  }
  const int64_t first = static_cast<int64_t>(token) + static_cast<int32_t>(part.band.offset);
  return first <= queries.span.high && first + part.band.width >= queries.span.low;
}

// Walks the tiles of all lists of a query tile, for one lane. Every step finishes one tile and
// begins loads of the next two, so what a step waits for was asked for a tile earlier.
template <int kBlockN, bool kHasScale>
class LaneStager {
 public:
  PERMATTN_DEVICE LaneStager(const AttentionArgs& args, const PartHead* heads, int32_t lane)
      : args_(args), heads_(heads), lane_(lane) {}

  // Steps until the first tile comes out.
  static constexpr int kDelay = 2;

  // Writes the oldest tile under way, if there is one.
  PERMATTN_DEVICE void step(const QueryTokens& queries, LaneTile<kBlockN>* tile) {
    if (slot_list_ >= 0) write(queries, *tile);
    load_token();
    load_entry();
  }

 private:
  const AttentionArgs& args_;
  const PartHead* heads_;
  int32_t lane_;

  // The next tile: list, and its first lane there.
  int32_t list_ = 0, first_lane_ = 0;

  int32_t entry_list_ = -1, entry_ = -1, inside_ = 0;  // entry under way
  int32_t slot_list_ = -1, slot_ = 0, token_ = -1;     // token under way
  float scale_ = 1.0F;

  PERMATTN_DEVICE void load_entry() {
    entry_list_ = -1;
    while (list_ < 2 * args_.num_parts && first_lane_ >= heads_[list_ / 2].num_lanes[list_ & 1]) {
      ++list_;
      first_lane_ = 0;
    }
    if (list_ >= 2 * args_.num_parts) return;
    const PartHead& head = heads_[list_ / 2];
    const int32_t block_kv = args_.parts[list_ / 2].block_kv;
    const int32_t lane = first_lane_ + lane_;
    const int32_t entry = lane / block_kv;
    entry_list_ = list_;
    inside_ = lane - entry * block_kv;
    entry_ = -1;
    if (lane < head.num_lanes[list_ & 1]) {
      entry_ = head.entries[entry + ((list_ & 1) != 0 ? head.num_entries[0] : 0)];
    }
    first_lane_ += kBlockN;
  }

  PERMATTN_DEVICE void load_token() {
    slot_list_ = entry_list_;
    token_ = -1;
    scale_ = 1.0F;
    slot_ = -1;
    if (entry_list_ < 0) return;
    const PartArgs& part = args_.parts[entry_list_ / 2];
    const PartHead& head = heads_[entry_list_ / 2];
    if (static_cast<uint32_t>(entry_) >= static_cast<uint32_t>(head.num_blocks)) return;
    const int32_t slot = entry_ * part.block_kv + inside_;
    if (slot >= part.num_slots) return;
    slot_ = slot;
    token_ = head.kv_token == nullptr ? slot : head.kv_token[slot];
    if constexpr (kHasScale) scale_ = head.k_scale[slot / args_.kv_rows];
  }

  PERMATTN_DEVICE void write(const QueryTokens& queries, LaneTile<kBlockN>& tile) {
    const PartArgs& part = args_.parts[slot_list_ / 2];
    bool seen = static_cast<uint32_t>(token_) < static_cast<uint32_t>(args_.num_kv_tokens);
    if ((slot_list_ & 1) != 0 && part.has_band) {
      seen = seen && some_query_sees(queries, token_, part);
    }
    tile.token[lane_] = seen ? token_ : -1;
    tile.slot[lane_] = slot_;
    if constexpr (kHasScale) tile.scale[lane_] = scale_;
    const uint32_t mask = ptx::ballot(seen);
    if (lane_ % 32 == 0) tile.seen[lane_ / 32] = mask;
    if (lane_ == 0) {
      tile.list = slot_list_;
      tile.group = slot_ < 0 ? -1 : slot_ / (args_.kv_rows > 0 ? args_.kv_rows : 1);
    }
  }
};

}  // namespace permattn::device
