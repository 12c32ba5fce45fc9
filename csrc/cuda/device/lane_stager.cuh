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
// begins loads of the next two, so what a step waits for was asked for a tile earlier. It lives in
// registers while tiles are multiplied, so it is packed.
template <int kBlockN, bool kHasScale>
class LaneStager {
 public:
  PERMATTN_DEVICE LaneStager(const AttentionArgs& args, const PartHead* heads, int32_t lane)
      : args_(args), heads_(heads), lane_(lane) {}

  // Steps until the first tile comes out.
  static constexpr int kDelay = 2;

  // Writes the oldest tile under way, if there is one, and the slots of the one behind it.
  PERMATTN_DEVICE void step(const QueryTokens& queries, LaneTile<kBlockN>& tile,
                            LaneTile<kBlockN>& behind) {
    const int32_t slot_list = list_of(2), entry_list = list_of(1);
    if (slot_list != kNone) write(queries, slot_list, tile);
    if (entry_list != kNone) load_token(entry_list, behind);
    int32_t next = list_of(0);
    while (next < 2 * args_.num_parts && first_lane_ >= heads_[next / 2].num_lanes[next % 2]) {
      ++next;
      first_lane_ = 0;
    }
    const bool is_there = next < 2 * args_.num_parts;
    if (is_there) load_entry(next);
    lists_ = static_cast<uint32_t>(next | (is_there ? next : kNone) << 8 | entry_list << 16);
  }

 private:
  static constexpr int32_t kNone = 0xFF;

  const AttentionArgs& args_;
  const PartHead* heads_;
  int32_t lane_;

  // A byte each: list of the next tile, of the entry under way and of the token under way.
  uint32_t lists_ = kNone << 8 | kNone << 16;
  int32_t first_lane_ = 0;  // of the next tile, in its list
  int32_t entry_ = -1, inside_ = 0;
  int32_t token_ = -1;
  float scale_ = 1.0F;

  PERMATTN_DEVICE int32_t list_of(int i) const {
    return static_cast<int32_t>(lists_ >> (8 * i) & 0xFF);
  }

  PERMATTN_DEVICE void load_entry(int32_t list) {
    const PartHead& head = heads_[list / 2];
    const int32_t lane = first_lane_ + lane_;
    const int32_t entry = lane / args_.parts[list / 2].block_kv;
    inside_ = lane - entry * args_.parts[list / 2].block_kv;
    entry_ = -1;
    if (lane < head.num_lanes[list % 2]) {
      entry_ = head.entries[entry + (list % 2 != 0 ? head.num_entries[0] : 0)];
    }
    first_lane_ += kBlockN;
  }

  PERMATTN_DEVICE void load_token(int32_t list, LaneTile<kBlockN>& tile) {
    const PartArgs& part = args_.parts[list / 2];
    const PartHead& head = heads_[list / 2];
    const bool in_range = static_cast<uint32_t>(entry_) < static_cast<uint32_t>(head.num_blocks);
    int32_t slot = in_range ? entry_ * part.block_kv + inside_ : -1;
    slot = slot < part.num_slots ? slot : -1;
    tile.slot[lane_] = slot;
    token_ = -1;
    scale_ = 1.0F;
    if (slot < 0) return;
    token_ = head.kv_token == nullptr ? slot : head.kv_token[slot];
    if constexpr (kHasScale) scale_ = head.k_scale[slot / args_.kv_rows];
  }

  PERMATTN_DEVICE void write(const QueryTokens& queries, int32_t list, LaneTile<kBlockN>& tile) {
    const PartArgs& part = args_.parts[list / 2];
    bool seen = static_cast<uint32_t>(token_) < static_cast<uint32_t>(args_.num_kv_tokens);
    if (list % 2 != 0 && part.has_band) seen = seen && some_query_sees(queries, token_, part);
    tile.token[lane_] = seen ? token_ : -1;
    if constexpr (kHasScale) tile.scale[lane_] = scale_;
    const uint32_t mask = ptx::ballot(seen);
    if (lane_ % 32 == 0) tile.seen[lane_ / 32] = mask;
    if (lane_ == 0) {
      tile.list = list;
      const int32_t slot = tile.slot[0];
      tile.group = slot < 0 ? -1 : slot / (args_.kv_rows > 0 ? args_.kv_rows : 1);
    }
  }
};

}  // namespace permattn::device
