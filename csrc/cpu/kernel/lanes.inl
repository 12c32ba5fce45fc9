// Who sits in the lanes of a tile, and the chunk of streamed tokens that they look at.

// Streamed tokens per chunk: a multiple of every register block of gemm.inl.
constexpr int kChunk = PERMATTN_CHUNK;
constexpr int kLaneWords = kTileLanes / 64;

struct Lanes {
  alignas(64) int32_t token[kTileLanes];  // compact: holes are left out
  int32_t slot[kTileLanes];
  uint64_t valid[kLaneWords];  // bit i: lane i is in use
  int count;
};

// Reads the slots [first, first + size) of a permutation. A slot counts when both maps agree on it,
// so a damaged plan can neither leave the tensor nor give one row to two tiles.
PERMATTN_INLINE void read_lanes(Lanes& lanes, const PermView& perm, int64_t b, int64_t h,
                                int64_t first, int64_t size) {
  const int32_t* token_of_slot = perm.token_of_slot.row(b, h);
  const int32_t* slot_of_token = perm.slot_of_token.row(b, h);
  const uint64_t num_tokens = perm.slot_of_token.size;
  int count = 0;
  for (int64_t slot = first; slot < first + size; ++slot) {
    const int32_t token = token_of_slot[slot];
    if (static_cast<uint32_t>(token) >= num_tokens || slot_of_token[token] != slot) continue;
    lanes.token[count] = token;
    lanes.slot[count++] = static_cast<int32_t>(slot);
  }
  lanes.count = count;
  for (int i = count; i < kTileLanes; ++i) lanes.token[i] = -1;
  for (int w = 0; w < kLaneWords; ++w) {
    const int in_word = count - 64 * w;
    lanes.valid[w] = in_word >= 64 ? ~uint64_t{0} : in_word <= 0 ? 0 : (uint64_t{1} << in_word) - 1;
  }
}

struct Chunk {
  int count;
  bool masked;  // some token is not seen by every lane
  int32_t token[kChunk];
  uint64_t seen[kChunk][kLaneWords];  // bits past the lanes in use are set
};

// Which lanes see the token; false when none does.
PERMATTN_INLINE bool lanes_that_see(const Lanes& lanes, uint32_t token, const LaneRange& range,
                                    uint64_t* seen) {
  const uint32_t base = token + range.offset;
  uint64_t any = 0;
  for (int w = 0; w < kLaneWords; ++w) {
    uint64_t bits = 0;
    if (lanes.valid[w] != 0) {
      for (int i = 0; i < 64; i += kWidth) {
        const auto* lane = reinterpret_cast<const uint32_t*>(lanes.token) + 64 * w + i;
        bits |= static_cast<uint64_t>(lanes_in_range(lane, base, range.width)) << i;
      }
    }
    any |= bits & lanes.valid[w];
    seen[w] = bits | ~lanes.valid[w];
  }
  return any != 0;
}

// Feeds every token of the listed blocks of one row that some lane sees, chunk by chunk, to
// `flush`.
template <class Flush>
PERMATTN_INLINE void stream_row(const IndexView& index, const PermView& perm,
                                const LaneRange& range, int64_t b, int64_t h, int64_t row,
                                const Lanes& lanes, Chunk& chunk, Flush& flush) {
  const int32_t* offsets = index.row_offsets.row(b, h);
  const int64_t capacity = index.indices.size;
  const int64_t begin = offsets[row] < 0 ? 0 : offsets[row];
  const int64_t end = offsets[row + 1] > capacity ? capacity : offsets[row + 1];
  const int64_t full_end = begin + index.num_full.row(b, h)[row];
  const int32_t* block_of_entry = index.indices.row(b, h);
  const int32_t* token_of_slot = perm.token_of_slot.row(b, h);
  const int64_t num_slots = perm.token_of_slot.size;
  const uint64_t num_tokens = perm.slot_of_token.size;
  for (int64_t entry = begin; entry < end; ++entry) {
    const bool full = entry < full_end;
    const int64_t block = block_of_entry[entry];
    const int64_t first = block * index.block_col;
    if (block < 0 || first >= num_slots || (!full && range.empty)) continue;
    const int64_t last = first + index.block_col < num_slots ? first + index.block_col : num_slots;
    for (int64_t slot = first; slot < last; ++slot) {
      const int32_t token = token_of_slot[slot];
      if (static_cast<uint32_t>(token) >= num_tokens) continue;
      uint64_t* seen = chunk.seen[chunk.count];
      if (full) {
        for (int w = 0; w < kLaneWords; ++w) seen[w] = ~uint64_t{0};
      } else {
        if (!lanes_that_see(lanes, static_cast<uint32_t>(token), range, seen)) continue;
        for (int w = 0; w < kLaneWords; ++w) chunk.masked |= seen[w] != ~uint64_t{0};
      }
      chunk.token[chunk.count] = token;
      if (++chunk.count == kChunk) flush();
    }
  }
}
