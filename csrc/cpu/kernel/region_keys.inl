// Which keys a region of queries sees: packed regions, kept while they fit, and chunks of their
// rows.

// Rows of keys per chunk: even.
constexpr int kRegionChunk = 64;
constexpr int kRegionSlack = 8;

// Packed regions of the heads of a task, each packed on its first use, so that a region which
// nobody looks at is never read. Where regions are large they make room for one another: packing
// them again costs one part in so many queries.
template <class Math, int H>
class PackedRegions {
 public:
  PackedRegions(const RegionParams& p, bool keep_all)
      : size_(p), num_regions_(p.kv_grid.num_regions()), slots_(num_regions_) {
    constexpr int64_t kEnoughRows = 64, kEnoughFloats = int64_t{1} << 18;
    if (!keep_all && p.kv_grid.cells() >= kEnoughRows) {
      const int64_t fit = kEnoughFloats / size_.region;
      slots_ = fit < 1 ? 1 : fit < num_regions_ ? fit : num_regions_;
    }
  }

  void carve(Carver& carver) {
    held_ = reinterpret_cast<int32_t*>(carver.floats(slots_));
    // Blocks of columns read beyond the last row.
    data_ = carver.floats(slots_ * size_.region + kRegionSlack * H);
  }

  void clear() {
    for (int64_t i = 0; i < slots_; ++i) held_[i] = -1;
  }

  bool keeps_all() const { return slots_ == num_regions_; }
  const RowSizes<Math, H>& size() const { return size_; }

  PERMATTN_METHOD const float* find(const RegionParams& p, int64_t b, int64_t m, int32_t region) {
    const int64_t slot = keeps_all() ? region : region % slots_;
    float* rows = data_ + slot * size_.region;
    if (held_[slot] != region) {
      pack_region<Math, H>(p, b, m, region, rows);
      held_[slot] = region;
    }
    return rows;
  }

 private:
  RowSizes<Math, H> size_;
  int64_t num_regions_, slots_;
  int32_t* held_;
  float* data_;
};

// Rows of one region in a chunk.
struct Piece {
  int32_t region, place;  // place: of the row of the graph
  int32_t row, count;     // in the chunk
  int32_t key;            // the first one, in the region
};

// Rows of several regions that meet a panel of queries at once.
struct KeyChunk {
  int count = 0, num_pieces = 0;
  Piece pieces[kRegionChunk];
  const float* keys[kRegionChunk + kRegionSlack];
  const float* values[kRegionChunk + kRegionSlack];  // by steps
  float weight[kRegionChunk];
  bool hidden[kRegionChunk];  // the row that pairs up with an odd last one
  bool any_hidden = false;

  PERMATTN_METHOD void clear() {
    count = num_pieces = 0;
    any_hidden = false;
  }

  // Rows beyond the last one that whole blocks read.
  PERMATTN_METHOD void seal() {
    for (int i = 0; i < kRegionSlack; ++i) {
      keys[count + i] = keys[0];
      values[count + i] = values[0];
    }
  }
};

// Feeds the keys of the regions in row r of the graph to `flush`, chunk by chunk.
template <class Math, int H, class Wanted, class Flush>
PERMATTN_INLINE void stream_regions(const RegionParams& p, int64_t b, int64_t m, int64_t r,
                                    PackedRegions<Math, H>& packed, KeyChunk& chunk,
                                    const Wanted& wanted, const Flush& flush) {
  constexpr int kPerStep = Math::kPerStep;
  const RowSizes<Math, H>& size = packed.size();
  const int32_t* row = p.row(b, m, r);
  const float* weights = p.weights == nullptr ? nullptr : p.weights_row(b, m, r);
  const auto num_regions = static_cast<uint32_t>(p.kv_grid.num_regions());
  const bool ragged = !p.count_padding;
  chunk.clear();
  for (int64_t s = 0; s < p.topk; ++s) {
    const int32_t region = row[s];
    if (static_cast<uint32_t>(region) >= num_regions || !wanted(region)) continue;
    if (chunk.count > 0 && !packed.keeps_all()) flush();
    const float* rows = packed.find(p, b, m, region);
    const float* values = rows + size.keys * size.key;
    const int64_t real = ragged ? Box(p.kv_grid, region).cells() : p.kv_grid.cells();
    const int64_t keys = round_up(real, kPerStep);
    for (int64_t key = 0; key < keys;) {
      const int64_t room = kRegionChunk - chunk.count;
      const auto count = static_cast<int32_t>(keys - key < room ? keys - key : room);
      chunk.pieces[chunk.num_pieces++] = {region, static_cast<int32_t>(s), chunk.count, count,
                                          static_cast<int32_t>(key)};
      for (int i = 0; i < count; ++i) {
        const int at = chunk.count + i;
        chunk.keys[at] = rows + (key + i) * size.key;
        chunk.weight[at] = weights == nullptr ? 1.0F : weights[s];
        chunk.hidden[at] = key + i >= real;
        if (i % kPerStep == 0) {
          chunk.values[at / kPerStep] = values + (key + i) / kPerStep * size.value;
        }
      }
      chunk.any_hidden |= key + count > real;
      chunk.count += count;
      key += count;
      if (chunk.count == kRegionChunk) flush();
    }
  }
  if (chunk.count > 0) flush();
}
