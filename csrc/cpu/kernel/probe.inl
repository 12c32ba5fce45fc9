// A probe's tile: a run of coordinates of one key head against the probe rows of its query heads.
// S^T = K Q^T with rows in lanes, as in the forward. The first sweep sums 2^s of every row. The
// second one sums probabilities along columns (across lanes) and along diagonals: from one
// coordinate to the next a diagonal moves by one lane, so its sum is carried by a shift.

template <class Math>
struct ProbeSizes {
  int64_t lanes;     // of one query head: its rows, padded to whole vectors
  int64_t steps;     // of Q K^T
  int64_t k_stride;  // floats per row of the packed keys
  int64_t skew;      // floats of one head's diagonals
  int64_t group;     // query heads per key head

  explicit ProbeSizes(const ProbeParams& p) {
    lanes = round_up(p.rows, kWidth);
    steps = round_up((p.head_dim + Math::kPerStep - 1) / Math::kPerStep, Math::kStepBlock);
    k_stride = round_up(steps, 16) + 16;
    skew = round_up(kProbeTile + lanes + kWidth, kWidth);
    group = p.q_heads / p.kv_heads;
  }
};

template <class Math>
struct ProbeBuffers {
  float *q, *k, *s;  // lanes per head as [step][lane] per panel; rows [key][step]; [key][lane]
  float *top, *sum;  // [group][lanes]; the second sweep has log2-sum-exp2 in `top`
  float* skew;       // [group][skew]
  float *column, *square;  // [key][kWidth]: partial sums of one head
  std::byte* end;

  ProbeBuffers(const ProbeSizes<Math>& size, std::byte* scratch) {
    Carver carver{scratch};
    q = carver.floats(size.group * size.lanes * size.steps);
    k = carver.floats((kChunk + kRowSlack) * size.k_stride);
    s = carver.floats((kChunk + kRowSlack) * kMaxPanel * kWidth);
    top = carver.floats(size.group * size.lanes);
    sum = carver.floats(size.group * size.lanes);
    skew = carver.floats(size.group * size.skew);
    column = carver.floats(kChunk * kWidth);
    square = carver.floats(kChunk * kWidth);
    end = carver.next;
  }
};

template <class Math>
size_t probe_scratch(const ProbeParams& p) {
  const ProbeBuffers<Math> buffers(ProbeSizes<Math>(p), nullptr);
  return static_cast<size_t>(buffers.end - static_cast<std::byte*>(nullptr));
}

// Consecutive coordinates of a tile.
struct ProbeChunk {
  int64_t first;  // in the tile
  int count;
  bool masked;            // some row does not see some key
  int32_t token[kChunk];  // always one that may be read
  int32_t need[kChunk];   // rows from here on see the key
};

// False where no row sees any key of the chunk.
PERMATTN_INLINE bool read_probe_chunk(const ProbeTile& tile, ProbeChunk& chunk) {
  const ProbeParams& p = *tile.params;
  const int32_t* range = p.key_range + 2 * tile.b;
  const int64_t position = p.first_position[tile.b];
  const int64_t begin = range[0] > 0 ? range[0] : 0;
  int64_t end = position + p.rows;
  if (range[1] < end) end = range[1];
  if (p.skv < end) end = p.skv;
  const int64_t coordinate = tile.first + chunk.first;
  const int32_t* order =
      p.order == nullptr ? nullptr : p.order + tile.b * p.order_stride_b + coordinate;
  int32_t some = -1;
  chunk.masked = false;
  for (int i = 0; i < chunk.count; ++i) {
    const int64_t key = order == nullptr ? coordinate + i : order[i];
    const bool valid = key >= begin && key < end;
    const int64_t behind = key > position ? key - position : 0;
    chunk.token[i] = static_cast<int32_t>(valid ? key : -1);
    chunk.need[i] = static_cast<int32_t>(valid ? behind : p.rows);
    chunk.masked |= chunk.need[i] > 0;
    if (valid) some = chunk.token[i];
  }
  if (some < 0) return false;
  for (int i = 0; i < chunk.count; ++i) {
    if (chunk.token[i] < 0) chunk.token[i] = some;
  }
  return true;
}

// x in the lanes (the first one stands for row `lane`) that see a key, `other` elsewhere.
PERMATTN_INLINE VecF select_rows(int64_t lane, int32_t need, VecF x, VecF other) {
  const int64_t hidden = need - lane;
  const uint32_t bits = hidden <= 0 ? ~0U : hidden >= kWidth ? 0U : ~0U << hidden;
  return select_bits(bits, x, other);
}

// First sweep: 2^(s c) of every lane, relative to the largest so far.
template <class Math, int Vectors>
PERMATTN_INLINE void add_probe_total(const ProbeBuffers<Math>& buf, const ProbeChunk& chunk,
                                     int64_t lane, float* top, float* sum) {
  constexpr int kLanes = Vectors * kWidth;
  VecF high[Vectors], total[Vectors];
  for (int y = 0; y < Vectors; ++y) high[y] = splat(-kInfinity);
  for (int i = 0; i < chunk.count; ++i) {
    for (int y = 0; y < Vectors; ++y) {
      float* s = buf.s + i * kLanes + y * kWidth;
      if (chunk.masked) {
        store(s, select_rows(lane + y * kWidth, chunk.need[i], load(s), splat(-kInfinity)));
      }
      high[y] = maximum(load(s), high[y]);
    }
  }
  for (int y = 0; y < Vectors; ++y) {
    const VecF before = load(top + y * kWidth);
    const VecF after = maximum(before, high[y] * kLog2E);
    store(top + y * kWidth, after);
    // -inf - -inf is NaN: a lane that has seen nothing is measured from a finite number.
    high[y] = maximum(splat(-1e30F), after);
    total[y] = load(sum + y * kWidth) * exp2_accurate(before - high[y]);
  }
  for (int i = 0; i < chunk.count; ++i) {
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) {
      total[y] += exp2_accurate(load(buf.s + i * kLanes + y * kWidth) * kLog2E - high[y]);
    }
  }
  for (int y = 0; y < Vectors; ++y) store(sum + y * kWidth, total[y]);
}

// Lanes move up by one: the first is the last of the vector below.
PERMATTN_INLINE VecF shift_lanes(VecF below, VecF x) {
#if PERMATTN_WIDTH == 16
  return __builtin_shufflevector(below, x, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,
                                 29, 30);
#elif PERMATTN_WIDTH == 8
  return __builtin_shufflevector(below, x, 7, 8, 9, 10, 11, 12, 13, 14);
#else
  return __builtin_shufflevector(below, x, 3, 4, 5, 6);
#endif
}

PERMATTN_INLINE void add_unaligned(float* p, VecF x) { store_unaligned(p, load_unaligned(p) + x); }

// Second sweep: probabilities of one panel, to the columns and, unless skipped, the diagonals.
// `skew` is where the lag of the chunk's first key and row 0 lies; it falls by one per key.
template <class Math, int Vectors>
PERMATTN_INLINE void add_probe_mass(const ProbeBuffers<Math>& buf, const ProbeChunk& chunk,
                                    int64_t lane, const float* log2_sum, const uint8_t* skip,
                                    float* skew) {
  constexpr int kLanes = Vectors * kWidth;
  VecF divisor[Vectors];
  VecF diagonal[Vectors + 1];  // one vector more catches what has passed all lanes
  for (int y = 0; y < Vectors; ++y) divisor[y] = load(log2_sum + y * kWidth);
  for (int y = 0; y <= Vectors; ++y) diagonal[y] = VecF{};
  for (int i = 0; i < chunk.count; ++i) {
    VecF column = lane == 0 ? VecF{} : load(buf.column + i * kWidth);
    VecF square = lane == 0 ? VecF{} : load(buf.square + i * kWidth);
    VecF p[Vectors];
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) {
      p[y] = exp2_accurate(load(buf.s + i * kLanes + y * kWidth) * kLog2E - divisor[y]);
      if (chunk.masked) p[y] = select_rows(lane + y * kWidth, chunk.need[i], p[y], VecF{});
      column += p[y];
      square += p[y] * p[y];
    }
    store(buf.column + i * kWidth, column);
    store(buf.square + i * kWidth, square);
#pragma GCC unroll 5
    for (int y = Vectors; y > 0; --y) diagonal[y] = shift_lanes(diagonal[y - 1], diagonal[y]);
    diagonal[0] = shift_lanes(VecF{}, diagonal[0]);
    if (skip == nullptr || skip[i] == 0) {
#pragma GCC unroll 4
      for (int y = 0; y < Vectors; ++y) diagonal[y] += p[y];
    }
    if (i % kWidth == kWidth - 1) {
      add_unaligned(skew - i + kLanes, diagonal[Vectors]);
      diagonal[Vectors] = VecF{};
    }
  }
  for (int y = 0; y <= Vectors; ++y) {
    add_unaligned(skew - (chunk.count - 1) + y * kWidth, diagonal[y]);
  }
}

// Sums over the lanes of x[key][lane], times `factor`, to out[key].
PERMATTN_INLINE void write_lane_sums(const float* x, int count, float factor, float* out) {
  for (int first = 0; first < count; first += kWidth) {
    VecF r[kWidth];
    for (int j = 0; j < kWidth; ++j) r[j] = load(x + (first + j) * kWidth);
    transpose(r);
    VecF total = r[0];
    for (int j = 1; j < kWidth; ++j) total += r[j];
    store_up_to<Float32>(out + first, total * factor, count - first);
  }
}

template <class Math>
struct ProbeRun {
  const ProbeTile& tile;
  const ProbeParams& p;
  ProbeSizes<Math> size;
  ProbeBuffers<Math> buf;
  RowsOf<typename Math::Storage> k;
  ProbeChunk chunk;

  ProbeRun(const ProbeTile& tile_, std::byte* scratch)
      : tile(tile_),
        p(*tile_.params),
        size(p),
        buf(size, scratch),
        k(p.k, tile_.b, tile_.kv_head) {}

  int64_t head(int64_t g) const { return tile.b * p.q_heads + tile.kv_head * size.group + g; }

  void pack_queries() {
    Lanes lanes;
    for (int i = 0; i < kTileLanes; ++i) lanes.token[i] = i;
    lanes.count = static_cast<int>(p.rows);
    for (int64_t g = 0; g < size.group; ++g) {
      const RowsOf<typename Math::Storage> q(p.q, tile.b, tile.kv_head * size.group + g);
      for (int lane = 0; lane < size.lanes; lane += kMaxPanel * kWidth) {
        Math::pack_lanes(q, lanes, lane, panel_vectors(lanes, lane), p.head_dim, 1.0F,
                         buf.q + (g * size.lanes + lane) * size.steps);
      }
    }
  }

  template <int Vectors, bool Mass>
  __attribute__((noinline)) void run_panel(int64_t g, int64_t lane) {
    const int64_t at = g * size.lanes + lane;
    Math::template scores<Vectors>(buf.k, size.k_stride, buf.q + at * size.steps, buf.s,
                                   chunk.count, size.steps);
    if constexpr (Mass) {
      const int64_t first = tile.first + chunk.first;
      const uint8_t* skip = p.skip == nullptr ? nullptr : p.skip + head(g) * p.size + first;
      float* skew = buf.skew + g * size.skew + (tile.size - 1 - chunk.first) + lane;
      add_probe_mass<Math, Vectors>(buf, chunk, lane, buf.top + at, skip, skew);
    } else {
      add_probe_total<Math, Vectors>(buf, chunk, lane, buf.top + at, buf.sum + at);
    }
  }

  template <bool Mass>
  void run_head(int64_t g) {
    for (int64_t lane = 0; lane < size.lanes; lane += kMaxPanel * kWidth) {
      const int64_t vectors = (size.lanes - lane) / kWidth;
      if (vectors == 1) {
        run_panel<1, Mass>(g, lane);
#if PERMATTN_WIDTH == 16
      } else if (vectors == 2) {
        run_panel<2, Mass>(g, lane);
      } else if (vectors == 3) {
        run_panel<3, Mass>(g, lane);
#endif
      } else {
        run_panel<kMaxPanel, Mass>(g, lane);
      }
    }
    if constexpr (Mass) {
      const float mean = 1.0F / static_cast<float>(p.rows);
      const int64_t at = head(g) * p.size + tile.first + chunk.first;
      write_lane_sums(buf.column, chunk.count, mean, p.column + at);
      write_lane_sums(buf.square, chunk.count, mean, p.square + at);
    }
  }

  template <bool Mass>
  void run_chunks() {
    for (chunk.first = 0; chunk.first < tile.size; chunk.first += kChunk) {
      const int64_t left = tile.size - chunk.first;
      chunk.count = static_cast<int>(left < kChunk ? left : kChunk);
      const bool seen = read_probe_chunk(tile, chunk);
      if (seen) Math::pack_rows(k, chunk.token, chunk.count, p.head_dim, size.k_stride, buf.k);
      for (int64_t g = 0; g < size.group; ++g) {
        if (seen) {
          run_head<Mass>(g);
        } else if (Mass) {
          const int64_t at = head(g) * p.size + tile.first + chunk.first;
          __builtin_memset(p.column + at, 0, chunk.count * sizeof(float));
          __builtin_memset(p.square + at, 0, chunk.count * sizeof(float));
        }
      }
    }
  }

  // Lags that this tile alone reaches go to the result, the lowest ones to the tile's edge: the
  // next tile reaches those too.
  void write_diagonals() {
    const float mean = 1.0F / static_cast<float>(p.rows);
    const int64_t shared = p.rows - 1;
    const int64_t lowest = p.first_coordinate[tile.b] - (tile.first + tile.size - 1);
    for (int64_t g = 0; g < size.group; ++g) {
      const float* skew = buf.skew + g * size.skew;
      for (int64_t t = 0; t < shared; ++t) tile.edge[g * shared + t] = skew[t] * mean;
      int64_t t = lowest + shared < 0 ? -lowest : shared;
      int64_t end = tile.size + shared;
      if (p.size - lowest < end) end = p.size - lowest;
      float* out = p.diagonal + head(g) * p.size + lowest;
      for (; t < end; ++t) out[t] = skew[t] * mean;
    }
  }
};

template <class Math>
void probe_total(const ProbeTile& tile, std::byte* scratch) {
  ProbeRun<Math> run(tile, scratch);
  const int64_t lanes = run.size.group * run.size.lanes;
  for (int64_t i = 0; i < lanes; i += kWidth) {
    store(run.buf.top + i, splat(-kInfinity));
    store(run.buf.sum + i, VecF{});
  }
  if (run.p.first_position[tile.b] >= 0) {
    run.pack_queries();
    run.template run_chunks<false>();
  }
  for (int64_t g = 0; g < run.size.group; ++g) {
    for (int64_t r = 0; r < run.p.rows; ++r) {
      tile.top[g * run.p.rows + r] = run.buf.top[g * run.size.lanes + r];
      tile.sum[g * run.p.rows + r] = run.buf.sum[g * run.size.lanes + r];
    }
  }
}

template <class Math>
void probe_mass(const ProbeTile& tile, std::byte* scratch) {
  ProbeRun<Math> run(tile, scratch);
  const ProbeParams& p = run.p;
  if (p.first_position[tile.b] < 0) {
    for (int64_t g = 0; g < run.size.group; ++g) {
      const int64_t at = run.head(g) * p.size + tile.first;
      __builtin_memset(p.column + at, 0, tile.size * sizeof(float));
      __builtin_memset(p.square + at, 0, tile.size * sizeof(float));
    }
    return;
  }
  run.pack_queries();
  for (int64_t g = 0; g < run.size.group; ++g) {
    const float* log2_sum = tile.log2_sum + run.head(g) * p.rows;
    for (int64_t r = 0; r < run.size.lanes; ++r) {
      run.buf.top[g * run.size.lanes + r] = r < p.rows ? log2_sum[r] : kInfinity;
    }
  }
  for (int64_t i = 0; i < run.size.group * run.size.skew; i += kWidth) {
    store(run.buf.skew + i, VecF{});
  }
  run.template run_chunks<true>();
  run.write_diagonals();
}
