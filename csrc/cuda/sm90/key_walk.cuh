// The keys of an item of work, tile by tile: the lists of both halves as one.
#pragma once
#include "../primitives/numbers.cuh"
#include "traits.cuh"

namespace permattn::sm90 {

// Place in a list, and its entries there, which a warp reads 32 at a time and 32 ahead.
class EntryReader {
 public:
  PERMATTN_DEVICE void begin(const EntryList& list, int32_t lane) {
    next_ = 0;
    window_ = read(list, lane);
    ahead_ = read(list, 32 + lane);
  }
  PERMATTN_DEVICE bool is_done(const EntryList& list) const { return next_ >= list.count; }
  PERMATTN_DEVICE int32_t peek() const { return __shfl_sync(~0U, window_, next_ % 32); }
  PERMATTN_DEVICE void advance(const EntryList& list, int32_t lane) {
    ++next_;
    if (next_ % 32 == 0) {
      window_ = ahead_;
      ahead_ = read(list, next_ + 32 + lane);
    }
  }

 private:
  int32_t next_ = 0, window_ = -1, ahead_ = -1;

  PERMATTN_DEVICE static int32_t read(const EntryList& list, int32_t at) {
    return at < list.count ? list.entries[at] : -1;
  }
};

// Walks the tiles of all lists, for one lane of them; warps walk in step. An entry that both halves
// want next is one entry of the tile, and of two others the smaller comes first.
template <class T>
class KeyWalk {
 public:
  // `halves`: bit by half that has queries; `is_shared`: they have one list.
  PERMATTN_DEVICE KeyWalk(const AttentionArgs& args, const typename T::Books& books, int32_t thread,
                          int32_t halves, bool is_shared)
      : args_(args), books_(books), lane_(thread), halves_(halves), is_shared_(is_shared) {
    begin_list();
  }

  // Finds the next tile and asks for what it needs of memory. False: there is none.
  PERMATTN_DEVICE bool fetch() {
    while (list_ < 2 * args_.num_parts) {
      if (find_entries()) {
        load_token();
        return true;
      }
      ++list_;
      begin_list();
    }
    return false;
  }

  // Writes the lane of the tile that was found last; threads past the tile's lanes may call it.
  PERMATTN_DEVICE void write(KeyTile<T::kBlockN>& tile) const {
    if (lane_ >= T::kBlockN) return;
    const PartArgs& part = args_.parts[list_ / 2];
    const bool is_partial = list_ % 2 != 0 && part.has_band;
    const bool exists = static_cast<uint32_t>(token_) < static_cast<uint32_t>(args_.num_kv_tokens);
    bool hidden = exists;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      bool seen = exists && (wanted_ >> half & 1) != 0;
      if (is_partial) seen = seen && device::some_query_sees(queries(half), token_, part);
      tile.token[half][lane_] = seen ? token_ : -1;
      const uint32_t mask = ptx::ballot(seen);
      if (lane_ % 32 == 0) tile.seen[half][lane_ / 32] = mask;
      hidden = hidden && !seen;
    }
    const uint32_t mask = ptx::ballot(hidden);
    if (lane_ % 32 == 0) tile.hidden[lane_ / 32] = mask;
    tile.slot[lane_] = slot_;
    if constexpr (T::kQuantisedQk) tile.scale[lane_] = scale_;
    if (lane_ == 0) {
      tile.part = list_ / 2;
      tile.group = slot_ < 0 || slot_ >= part.num_slots
                       ? -1
                       : slot_ / (args_.kv_rows > 0 ? args_.kv_rows : 1);
      tile.is_partial = is_partial;
    }
  }

 private:
  const AttentionArgs& args_;
  const typename T::Books& books_;
  int32_t lane_, halves_;
  bool is_shared_;

  int32_t list_ = 0;  // 2 * part + (1: partial)
  EntryReader first_, second_;
  // The entry under way, who wants it, and how many of its lanes are left for the next tile.
  int32_t entry_ = -1, entry_halves_ = 0, left_ = 0;

  // This lane of the tile that was found: slot and token, and who wants them.
  int32_t slot_ = -1, token_ = -1, wanted_ = 0;
  float scale_ = 1.0F;

  PERMATTN_DEVICE const EntryList& list_of(int half) const { return books_.lists[half][list_]; }

  PERMATTN_DEVICE device::QueryTokens queries(int half) const {
    return {books_.q_tokens + half * kHalfRows, kHalfRows, books_.spans[half],
            args_.q_token.data == nullptr};
  }

  PERMATTN_DEVICE void begin_list() {
    left_ = 0;
    if (list_ >= 2 * args_.num_parts) return;
    first_.begin(list_of(0), lane_ % 32);
    second_.begin(list_of(1), lane_ % 32);
  }

  PERMATTN_DEVICE bool next_entry() {
    const EntryList &list0 = list_of(0), &list1 = list_of(1);
    const bool done0 = first_.is_done(list0), done1 = second_.is_done(list1);
    if (done0 && done1) return false;
    const int32_t entry0 = first_.peek(), entry1 = second_.peek();
    const bool takes0 = !done0 && (done1 || entry0 <= entry1);
    const bool takes1 = !done1 && (done0 || entry1 <= entry0);
    entry_ = takes0 ? entry0 : entry1;
    entry_halves_ = is_shared_ ? halves_ : int32_t(takes0) | int32_t(takes1) << 1;
    if (takes0) first_.advance(list0, lane_ % 32);
    if (takes1) second_.advance(list1, lane_ % 32);
    return true;
  }

  // Slots of the next tile of the list. False: the list is at its end.
  PERMATTN_DEVICE bool find_entries() {
    const int32_t block = args_.parts[list_ / 2].block_kv;
    int32_t start = left_;
    wanted_ = 0;
    slot_ = -1;
    if (lane_ < left_) take(block - left_ + lane_);
    while (start < T::kBlockN && next_entry()) {
      if (lane_ >= start && lane_ - start < block) take(lane_ - start);
      start += block;
    }
    left_ = start > T::kBlockN ? start - T::kBlockN : 0;
    return start > 0;
  }

  // The lane is slot `inside` of the entry under way.
  PERMATTN_DEVICE void take(int32_t inside) {
    const int32_t part = list_ / 2;
    wanted_ = entry_halves_;
    const bool in_range =
        static_cast<uint32_t>(entry_) < static_cast<uint32_t>(books_.parts[part].num_blocks);
    slot_ = in_range ? entry_ * args_.parts[part].block_kv + inside : -1;
  }

  PERMATTN_DEVICE void load_token() {
    const int32_t part = list_ / 2;
    token_ = -1;
    scale_ = 1.0F;
    if (lane_ >= T::kBlockN || slot_ < 0 || slot_ >= args_.parts[part].num_slots) return;
    const PartPlace& place = books_.parts[part];
    token_ = place.kv_token == nullptr ? slot_ : place.kv_token[slot_];
    if constexpr (T::kQuantisedQk) scale_ = place.k_scale[slot_ / args_.kv_rows];
  }
};

}  // namespace permattn::sm90
