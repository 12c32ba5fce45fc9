// Forward of one tile: S^T = K Q^T with queries in lanes, so that the softmax needs no horizontal
// step; O^T += V^T P^T; rows go back to token order at the end.

template <class Math>
struct FwdSizes {
  int64_t steps;     // of Q K^T
  int64_t k_stride;  // floats per row of the packed keys
  int64_t v_stride;  // floats per step of the packed values

  explicit FwdSizes(const Problem& p) {
    steps = round_up((p.head_dim + Math::kPerStep - 1) / Math::kPerStep, Math::kStepBlock);
    k_stride = round_up(steps, 16) + 16;
    v_stride = round_up(p.head_dim_v, 16) + 16;
  }
};

template <class Math>
struct FwdBuffers {
  Carver carver;
  Sums sums;
  float *q, *s, *k, *v;

  FwdBuffers(const FwdSizes<Math>& size, int64_t dim_v, std::byte* scratch)
      : carver{scratch}, sums(carver, dim_v) {
    q = carver.floats(kTileLanes * size.steps);
    s = carver.floats((kChunk + kRowSlack) * kMaxPanel * kWidth);
    k = carver.floats((kChunk + kRowSlack) * size.k_stride);
    v = carver.floats((kChunk + kRowSlack) * size.v_stride);
  }
};

template <class Math>
size_t forward_scratch(const Problem& p) {
  const FwdBuffers<Math> buffers(FwdSizes<Math>(p), p.head_dim_v, nullptr);
  return static_cast<size_t>(buffers.carver.next - static_cast<std::byte*>(nullptr));
}

// One panel of lanes against one chunk of packed keys and values.
template <class Math, int Vectors>
static __attribute__((noinline)) void attend(const FwdSizes<Math>& size,
                                             const FwdBuffers<Math>& buf, const Chunk& chunk,
                                             int first_lane, int64_t dim_v, float c) {
  Math::template scores<Vectors>(buf.k, size.k_stride, buf.q + first_lane * size.steps, buf.s,
                                 chunk.count, size.steps);
  if (chunk.masked) hide_unseen<Vectors>(buf.s, chunk, first_lane);
  add_scores<Math, Vectors>(buf.sums, buf.s, chunk.count, first_lane, c, buf.v, size.v_stride,
                            dim_v);
}

template <class Math>
struct FwdTileRun {
  using Storage = typename Math::Storage;
  const FwdTile& tile;
  const FwdSizes<Math>& size;
  const FwdBuffers<Math>& buf;
  const Lanes& lanes;
  Chunk& chunk;
  RowsOf<Storage> k, v;
  int64_t dim, dim_v;
  float c;

  void operator()() {
    Math::pack_rows(k, chunk.token, chunk.count, dim, size.k_stride, buf.k);
    Math::pack_columns(v, chunk.token, chunk.count, dim_v, size.v_stride, buf.v);
    for (int lane = 0; lane < lanes.count; lane += kMaxPanel * kWidth) {
      const int vectors = panel_vectors(lanes, lane);
      if (vectors == 1) {
        attend<Math, 1>(size, buf, chunk, lane, dim_v, c);
#if PERMATTN_WIDTH == 16
      } else if (vectors == 2) {
        attend<Math, 2>(size, buf, chunk, lane, dim_v, c);
      } else if (vectors == 3) {
        attend<Math, 3>(size, buf, chunk, lane, dim_v, c);
#endif
      } else {
        attend<Math, kMaxPanel>(size, buf, chunk, lane, dim_v, c);
      }
    }
    chunk.count = 0;
    chunk.masked = false;
  }
};

template <class Math>
void forward_tile(const FwdTile& tile, std::byte* scratch) {
  using Storage = typename Math::Storage;
  const FwdParams& p = *tile.params;
  const Problem& problem = p.problem;
  const FwdSizes<Math> size(problem);
  const FwdBuffers<Math> buf(size, problem.head_dim_v, scratch);
  Lanes lanes;
  read_lanes(lanes, tile.group->q_perm, tile.b, tile.h, tile.slot, tile.size);
  if (lanes.count == 0) return;
  // A negative scale is moved into Q, so that the largest score is the largest product.
  const float sign = problem.scale > 0.0F ? 1.0F : problem.scale < 0.0F ? -1.0F : 0.0F;
  const float c = problem.scale == 0.0F ? 1.0F : problem.scale * sign * kLog2E;
  const int lanes_used = static_cast<int>(round_up(lanes.count, kWidth));
  const RowsOf<Storage> q(p.q, tile.b, tile.h);
  for (int lane = 0; lane < lanes_used; lane += kMaxPanel * kWidth) {
    Math::pack_lanes(q, lanes, lane, panel_vectors(lanes, lane), problem.head_dim, sign,
                     buf.q + lane * size.steps);
  }
  buf.sums.clear(lanes_used);
  const int64_t kv_head = tile.h / (problem.q_heads / problem.kv_heads);
  Chunk chunk;
  chunk.count = 0;
  chunk.masked = false;
  FwdTileRun<Math> flush{tile,
                         size,
                         buf,
                         lanes,
                         chunk,
                         RowsOf<Storage>(p.k, tile.b, kv_head),
                         RowsOf<Storage>(p.v, tile.b, kv_head),
                         problem.head_dim,
                         problem.head_dim_v,
                         c};
  for (int i = 0; i < tile.group->num_parts; ++i) {
    const PlanPart& part = problem.parts[tile.group->parts[i]];
    const int64_t row = tile.slot / part.index.block_row;
    if (row >= part.index.num_full.size) continue;
    stream_row(part.index, part.kv_perm, lanes_are_queries(part.band), tile.b, tile.h, row, lanes,
               chunk, flush);
  }
  if (chunk.count > 0) flush();
  finish<typename Math::Type>(tile, buf.sums, lanes);
}

template <class Math>
void forward_rest(const FwdTile& tile) {
  alignas(64) float row[kMaxHeadDim];
  const PermView& perm = tile.group->q_perm;
  const int32_t* slot_of_token = perm.slot_of_token.row(tile.b, tile.h);
  const int32_t* token_of_slot = perm.token_of_slot.row(tile.b, tile.h);
  const auto num_slots = static_cast<uint64_t>(perm.token_of_slot.size);
  for (int64_t token = tile.slot; token < tile.slot + tile.size; ++token) {
    const int32_t slot = slot_of_token[token];
    if (static_cast<uint32_t>(slot) < num_slots && token_of_slot[slot] == token) continue;
    __builtin_memset(row, 0, sizeof(row));
    write_row<typename Math::Type>(tile, static_cast<int32_t>(token), row, -kInfinity);
  }
}
