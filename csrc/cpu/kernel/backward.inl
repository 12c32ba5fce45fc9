// Backward of one tile. Lanes hold the side whose gradient the tile owns, the other side is
// streamed:
//   P = 2^(c S - lse2), dP = dO V^T, dS = P (dP - delta), d(lane side) += dS (streamed side)
// and where lanes are keys also dV += P^T dO. Nothing is shared between tiles: no atomics, and the
// order of every sum is fixed.
// Source: FlashAttention-2, algorithm 2, with the two loops apart.

template <class Math>
struct BwdSizes {
  int64_t a1_stride, a2_stride;  // floats per streamed row, width D and Dv
  int64_t c1_rows, c2_rows;      // rows of the sums with slack

  explicit BwdSizes(const Problem& p)
      : a1_stride(round_up(p.head_dim, 16) + 16),
        a2_stride(round_up(p.head_dim_v, 16) + 16),
        c1_rows(p.head_dim + kRowSlack),
        c2_rows(p.head_dim_v + kRowSlack) {}
};

template <class Math>
struct BwdBuffers {
  float *b1, *b2;  // lanes: Q and dO, or K and V; [width][lane] per panel
  float *a1, *a2;  // streamed: K and V, or Q and dO; [row][width]
  float *c1, *c2;  // sums: dQ, or dK and dV; [width][lane] per panel
  float *s, *ds;   // [row][lane] of one panel
  float *lane_lse, *lane_delta, *row;
  alignas(64) float stream_lse[kChunk], stream_delta[kChunk];
  std::byte* end;

  BwdBuffers(const BwdSizes<Math>& size, const Problem& p, std::byte* scratch) {
    Carver carver{scratch};
    b1 = carver.floats(kTileLanes * p.head_dim);
    b2 = carver.floats(kTileLanes * p.head_dim_v);
    a1 = carver.floats((kChunk + kRowSlack) * size.a1_stride);
    a2 = carver.floats((kChunk + kRowSlack) * size.a2_stride);
    c1 = carver.floats(kTileLanes * size.c1_rows);
    c2 = carver.floats(kTileLanes * size.c2_rows);
    s = carver.floats((kChunk + kRowSlack) * kMaxPanel * kWidth);
    ds = carver.floats((kChunk + kRowSlack) * kMaxPanel * kWidth);
    lane_lse = carver.floats(kTileLanes);
    lane_delta = carver.floats(kTileLanes);
    row = carver.floats(kWidth * kMaxHeadDim);
    end = carver.next;
  }
};

template <class Math>
size_t backward_scratch(const Problem& p) {
  const BwdBuffers<Math> buffers(BwdSizes<Math>(p), p, nullptr);
  return static_cast<size_t>(buffers.end - static_cast<std::byte*>(nullptr));
}

// log2-sum-exp2 of a query; +inf for one that saw nothing, so that its probabilities are 0.
PERMATTN_INLINE float log2_sum_of(float lse) {
  return lse == -kInfinity ? kInfinity : lse * kLog2E;
}

template <class Math, int Vectors, bool LanesAreKeys>
static __attribute__((noinline)) void attend_backward(const Problem& p, const BwdSizes<Math>& size,
                                                      const BwdBuffers<Math>& buf,
                                                      const Chunk& chunk, int first_lane) {
  constexpr int kLanes = Vectors * kWidth;
  const int count = chunk.count;
  const float c = p.scale * kLog2E;
  gemm<Math, Vectors>(buf.a1, size.a1_stride, 1, buf.b1 + first_lane * p.head_dim, buf.s, count,
                      p.head_dim, false);
  gemm<Math, Vectors>(buf.a2, size.a2_stride, 1, buf.b2 + first_lane * p.head_dim_v, buf.ds, count,
                      p.head_dim_v, false);
  for (int i = 0; i < count; ++i) {
    const uint64_t seen = chunk.seen[i][first_lane / 64] >> (first_lane % 64);
    for (int y = 0; y < Vectors; ++y) {
      float* s = buf.s + i * kLanes + y * kWidth;
      float* ds = buf.ds + i * kLanes + y * kWidth;
      const int lane = first_lane + y * kWidth;
      const VecF lse = LanesAreKeys ? splat(buf.stream_lse[i]) : load(buf.lane_lse + lane);
      const VecF delta = LanesAreKeys ? splat(buf.stream_delta[i]) : load(buf.lane_delta + lane);
      const VecF prob = exp2_accurate(load(s) * c - lse);
      VecF slope = prob * (load(ds) - delta);
      const auto bits = static_cast<uint32_t>(seen >> (y * kWidth));
      if (chunk.masked) slope = select_bits(bits, slope, VecF{});
      store(ds, slope);
      if (LanesAreKeys) store(s, chunk.masked ? select_bits(bits, prob, VecF{}) : prob);
    }
  }
  gemm<Math, Vectors>(buf.a1, 1, size.a1_stride, buf.ds, buf.c1 + first_lane * size.c1_rows,
                      p.head_dim, count, true);
  if (LanesAreKeys) {
    gemm<Math, Vectors>(buf.a2, 1, size.a2_stride, buf.s, buf.c2 + first_lane * size.c2_rows,
                        p.head_dim_v, count, true);
  }
}

template <class Math>
struct BwdTileRun {
  using Storage = typename Math::Storage;
  const BwdTile& tile;
  const BwdSizes<Math>& size;
  BwdBuffers<Math>& buf;
  const Lanes& lanes;
  Chunk& chunk;
  RowsOf<Storage> first, second;  // streamed: K and V, or Q and dO
  int64_t query_row;              // of (b, h) in [B, Hq, Sq]

  template <int Vectors>
  void attend(int lane) {
    const Problem& p = tile.params->problem;
    if (tile.lanes_are_keys) {
      attend_backward<Math, Vectors, true>(p, size, buf, chunk, lane);
    } else {
      attend_backward<Math, Vectors, false>(p, size, buf, chunk, lane);
    }
  }

  void operator()() {
    const Problem& p = tile.params->problem;
    Math::pack_rows(first, chunk.token, chunk.count, p.head_dim, size.a1_stride, buf.a1);
    Math::pack_rows(second, chunk.token, chunk.count, p.head_dim_v, size.a2_stride, buf.a2);
    if (tile.lanes_are_keys) {
      for (int i = 0; i < chunk.count; ++i) {
        buf.stream_lse[i] = log2_sum_of(tile.params->lse[query_row + chunk.token[i]]);
        buf.stream_delta[i] = tile.delta[query_row + chunk.token[i]];
      }
    }
    for (int lane = 0; lane < lanes.count; lane += kMaxPanel * kWidth) {
      const int vectors = panel_vectors(lanes, lane);
      if (vectors == 1) {
        attend<1>(lane);
#if PERMATTN_WIDTH == 16
      } else if (vectors == 2) {
        attend<2>(lane);
      } else if (vectors == 3) {
        attend<3>(lane);
#endif
      } else {
        attend<kMaxPanel>(lane);
      }
    }
    chunk.count = 0;
    chunk.masked = false;
  }
};

// Adds C[column][lane] * factor to the rows of the tile's tokens in grad [S, columns].
PERMATTN_INLINE void add_lanes(const float* c, int64_t c_rows, int64_t columns, float factor,
                               const Lanes& lanes, float* row, float* grad) {
  const int64_t row_stride = round_up(columns, kWidth);
  for (int lane = 0; lane < lanes.count; lane += kWidth) {
    const int panel = lane / (kMaxPanel * kWidth) * (kMaxPanel * kWidth);
    const int64_t width = panel_vectors(lanes, panel) * kWidth;
    lanes_to_rows(c + panel * c_rows + (lane - panel), width, columns, splat(factor), row,
                  row_stride);
    const int count = lanes.count - lane < kWidth ? lanes.count - lane : kWidth;
    for (int j = 0; j < count; ++j) {
      float* to = grad + lanes.token[lane + j] * columns;
      const float* from = row + j * row_stride;
      for (int64_t d = 0; d < columns; ++d) to[d] += from[d];
    }
  }
}

template <class Math>
void backward_tile(const BwdTile& tile, std::byte* scratch) {
  using Storage = typename Math::Storage;
  const BwdParams& params = *tile.params;
  const Problem& p = params.problem;
  const BwdSizes<Math> size(p);
  BwdBuffers<Math> buf(size, p, scratch);
  const bool keys = tile.lanes_are_keys;
  const PlanPart& first_part = p.parts[tile.parts[0]];
  Lanes lanes;
  read_lanes(lanes, keys ? first_part.kv_perm : first_part.q_perm, tile.b, tile.h, tile.slot,
             tile.size);
  if (lanes.count == 0) return;
  const int64_t kv_head = tile.h / (p.q_heads / p.kv_heads);
  const int64_t query_row = (tile.b * p.q_heads + tile.h) * p.sq;
  const int64_t key_row = (tile.b * p.kv_heads + kv_head) * p.skv;
  const RowsOf<Storage> q(params.q, tile.b, tile.h), dout(params.dout, tile.b, tile.h);
  const RowsOf<Storage> k(params.k, tile.b, kv_head), v(params.v, tile.b, kv_head);
  const int lanes_used = static_cast<int>(round_up(lanes.count, kWidth));
  for (int lane = 0; lane < lanes_used; lane += kMaxPanel * kWidth) {
    const int vectors = panel_vectors(lanes, lane);
    Math::pack_lanes(keys ? k : q, lanes, lane, vectors, p.head_dim, 1.0F,
                     buf.b1 + lane * p.head_dim);
    Math::pack_lanes(keys ? v : dout, lanes, lane, vectors, p.head_dim_v, 1.0F,
                     buf.b2 + lane * p.head_dim_v);
  }
  for (int64_t i = 0; i < lanes_used * size.c1_rows; i += kWidth) store(buf.c1 + i, VecF{});
  for (int64_t i = 0; i < lanes_used * size.c2_rows; i += kWidth) store(buf.c2 + i, VecF{});
  for (int i = 0; i < lanes_used; ++i) {
    const bool used = !keys && i < lanes.count;
    buf.lane_lse[i] = used ? log2_sum_of(params.lse[query_row + lanes.token[i]]) : kInfinity;
    buf.lane_delta[i] = used ? tile.delta[query_row + lanes.token[i]] : 0.0F;
  }
  Chunk chunk;
  chunk.count = 0;
  chunk.masked = false;
  BwdTileRun<Math> flush{tile, size, buf, lanes, chunk, keys ? q : k, keys ? dout : v, query_row};
  for (int i = 0; i < tile.num_parts; ++i) {
    const PlanPart& part = p.parts[tile.parts[i]];
    const IndexView& index = keys ? part.transposed : part.index;
    const int64_t row = tile.slot / index.block_row;
    if (row >= index.num_full.size) continue;
    stream_row(index, keys ? part.q_perm : part.kv_perm,
               keys ? lanes_are_keys(part.band) : lanes_are_queries(part.band), tile.b, tile.h, row,
               lanes, chunk, flush);
  }
  if (chunk.count > 0) flush();
  if (keys) {
    add_lanes(buf.c1, size.c1_rows, p.head_dim, p.scale, lanes, buf.row,
              params.dk + key_row * p.head_dim);
    add_lanes(buf.c2, size.c2_rows, p.head_dim_v, 1.0F, lanes, buf.row,
              params.dv + key_row * p.head_dim_v);
  } else {
    add_lanes(buf.c1, size.c1_rows, p.head_dim, p.scale, lanes, buf.row,
              params.dq + query_row * p.head_dim);
  }
}

template <class Math>
void backward_delta(const BwdTile& tile, float* delta) {
  using Type = typename Math::Type;
  using Storage = typename Math::Storage;
  const BwdParams& params = *tile.params;
  const Problem& p = params.problem;
  const RowsOf<Storage> out(params.out, tile.b, tile.h), dout(params.dout, tile.b, tile.h);
  const int64_t row = (tile.b * p.q_heads + tile.h) * p.sq;
  for (int64_t token = tile.slot; token < tile.slot + tile.size; ++token) {
    VecF sum{};
    for (int64_t d = 0; d < p.head_dim_v; d += kWidth) {
      const int64_t left = p.head_dim_v - d;
      sum += load_up_to<Type>(out[token] + d, left) * load_up_to<Type>(dout[token] + d, left);
    }
    float total = 0.0F;
    for (int i = 0; i < kWidth; ++i) total += sum[i];
    delta[row + token] = total - params.dlse[row + token];
  }
}
