// Forward of one tile: S^T = K Q^T with queries in lanes, so that the softmax needs no horizontal
// step; O^T += V^T P^T; rows go back to token order at the end.
// Source: FlashAttention-2 (online softmax, rescale late); the lazy reference maximum is ours: it
// moves only when a score passes it by 2^16 and is an integer, so that rescaling is exact.

constexpr float kRescaleAt = 16.0F;

template <class Math>
struct FwdSizes {
  int64_t steps;     // of Q K^T
  int64_t k_stride;  // floats per row of the packed keys
  int64_t v_stride;  // floats per step of the packed values
  int64_t o_rows;    // rows of O^T with slack

  explicit FwdSizes(const Problem& p) {
    steps = round_up((p.head_dim + Math::kPerStep - 1) / Math::kPerStep, Math::kStepBlock);
    k_stride = round_up(steps, 16) + 16;
    v_stride = round_up(p.head_dim_v, 16) + 16;
    o_rows = p.head_dim_v + kRowSlack;
  }
};

template <class Math>
struct FwdBuffers {
  float *q, *o, *s, *k, *v, *top, *sum, *row;

  FwdBuffers(const FwdSizes<Math>& size, int64_t dim_v, std::byte* scratch) {
    Carver carver{scratch};
    q = carver.floats(kTileLanes * size.steps);
    o = carver.floats(kTileLanes * size.o_rows);
    s = carver.floats((kChunk + kRowSlack) * kMaxPanel * kWidth);
    k = carver.floats((kChunk + kRowSlack) * size.k_stride);
    v = carver.floats((kChunk + kRowSlack) * size.v_stride);
    top = carver.floats(kTileLanes);
    sum = carver.floats(kTileLanes);
    row = carver.floats(kWidth * round_up(dim_v, kWidth));
    end = carver.next;
  }
  std::byte* end;
};

template <class Math>
size_t forward_scratch(const Problem& p) {
  const FwdBuffers<Math> buffers(FwdSizes<Math>(p), p.head_dim_v, nullptr);
  return static_cast<size_t>(buffers.end - static_cast<std::byte*>(nullptr));
}

// Raises the reference of lanes that need it, and scales what was summed so far by a power of two.
template <int Vectors>
static __attribute__((noinline, cold)) void rescale(const float* want, float* top, float* sum,
                                                    float* o, int64_t dim_v) {
  constexpr int kLanes = Vectors * kWidth;
  for (int y = 0; y < kLanes; y += kWidth) {
    const VecF before = load(top + y);
    const VecF after = select(load(want + y) > before + kRescaleAt, load(want + y), before);
    // -inf - -inf is NaN, and nothing was summed there: any factor will do.
    const VecF shrink = select(before == after, splat(1.0F), exp2_integer(before - after));
    store(top + y, after);
    store(sum + y, load(sum + y) * shrink);
    for (int64_t d = 0; d < dim_v; ++d) {
      float* p = o + d * kLanes + y;
      store(p, load(p) * shrink);
    }
  }
}

template <int Vectors>
PERMATTN_INLINE void hide_unseen(float* s, const Chunk& chunk, int first_lane) {
  constexpr int kLanes = Vectors * kWidth;
  for (int i = 0; i < chunk.count; ++i) {
    const uint64_t seen = chunk.seen[i][first_lane / 64] >> (first_lane % 64);
    for (int y = 0; y < Vectors; ++y) {
      float* p = s + i * kLanes + y * kWidth;
      const auto bits = static_cast<uint32_t>(seen >> (y * kWidth));
      store(p, select_bits(bits, load(p), splat(-kInfinity)));
    }
  }
}

// One panel of lanes against one chunk of packed keys and values.
template <class Math, int Vectors>
static __attribute__((noinline)) void attend(const FwdSizes<Math>& size,
                                             const FwdBuffers<Math>& buf, const Chunk& chunk,
                                             int first_lane, int64_t dim_v, float c) {
  constexpr int kLanes = Vectors * kWidth;
  const int count = chunk.count;
  float* s = buf.s;
  float* o = buf.o + first_lane * size.o_rows;
  float* top = buf.top + first_lane;
  float* sum = buf.sum + first_lane;
  Math::template scores<Vectors>(buf.k, size.k_stride, buf.q + first_lane * size.steps, s, count,
                                 size.steps);
  if (chunk.masked) hide_unseen<Vectors>(s, chunk, first_lane);
  VecF high[Vectors];
  for (int y = 0; y < Vectors; ++y) high[y] = splat(-kInfinity);
  for (int i = 0; i < count; ++i) {
    for (int y = 0; y < Vectors; ++y) high[y] = maximum(load(s + i * kLanes + y * kWidth), high[y]);
  }
  alignas(64) float want[kLanes];
  bool late = false;
  for (int y = 0; y < Vectors; ++y) {
    const VecF wanted = round_to_integer(high[y] * c);
    store(want + y * kWidth, wanted);
    late |= any_greater(wanted, load(top + y * kWidth) + kRescaleAt);
  }
  if (__builtin_expect(late, 0)) rescale<Vectors>(want, top, sum, o, dim_v);
  VecF reference[Vectors];
  VecF total[Vectors];
  for (int y = 0; y < Vectors; ++y) {
    reference[y] = maximum(splat(-1e30F), load(top + y * kWidth));
    total[y] = load(sum + y * kWidth);
  }
  Math::template probabilities<Vectors>(s, count, c, reference, total);
  for (int y = 0; y < Vectors; ++y) store(sum + y * kWidth, total[y]);
  Math::template values<Vectors>(buf.v, size.v_stride, s, o, count, dim_v);
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

// Where another group holds a partial result of the token; -1 = it saw nothing of it.
PERMATTN_INLINE int64_t find_partial(const FwdTile& tile, const Partial& other, int32_t token) {
  const int32_t slot = other.q_perm.slot_of_token.row(tile.b, tile.h)[token];
  if (slot < 0 || slot >= other.num_slots) return -1;
  if (other.q_perm.token_of_slot.row(tile.b, tile.h)[slot] != token) return -1;
  const int64_t head = tile.b * tile.params->problem.q_heads + tile.h;
  const int64_t place = head * other.num_slots + slot;
  return other.log2_sum[place] == -kInfinity ? -1 : place;
}

// Brings other groups' partial results of the token under one softmax with `row`, in place.
PERMATTN_INLINE float merge_partials(const FwdTile& tile, int32_t token, float* row,
                                     float log2_sum) {
  const int64_t dim_v = tile.params->problem.head_dim_v;
  float highest = log2_sum;
  bool found = false;
  for (int i = 0; i < tile.num_others; ++i) {
    const int64_t place = find_partial(tile, tile.others[i], token);
    if (place < 0) continue;
    const float sum = tile.others[i].log2_sum[place];
    highest = sum > highest ? sum : highest;
    found = true;
  }
  if (!found) return log2_sum;
  float total = log2_sum == -kInfinity ? 0.0F : __builtin_exp2f(log2_sum - highest);
  for (int64_t d = 0; d < dim_v; d += kWidth) store(row + d, load(row + d) * total);
  for (int i = 0; i < tile.num_others; ++i) {
    const Partial& other = tile.others[i];
    const int64_t place = find_partial(tile, other, token);
    if (place < 0) continue;
    const float weight = __builtin_exp2f(other.log2_sum[place] - highest);
    total += weight;
    const float* from = other.rows + place * dim_v;
    for (int64_t d = 0; d < dim_v; d += kWidth) {
      store(row + d, load(row + d) + load_up_to<Float32>(from + d, dim_v - d) * weight);
    }
  }
  for (int64_t d = 0; d < dim_v; d += kWidth) store(row + d, load(row + d) * (1.0F / total));
  return highest + __builtin_log2f(total);
}

// The result of one query goes to its token's row. `row` is scratch: merging changes it.
template <class Type>
PERMATTN_INLINE void write_row(const FwdTile& tile, int32_t token, float* row, float log2_sum) {
  const FwdParams& p = *tile.params;
  const int64_t dim_v = p.problem.head_dim_v;
  if (tile.num_others > 0) log2_sum = merge_partials(tile, token, row, log2_sum);
  auto* out = static_cast<typename Type::Storage*>(p.out.data) + tile.b * p.out.stride_b +
              tile.h * p.out.stride_h + token * p.out.stride_s;
  for (int64_t d = 0; d < dim_v; d += kWidth) {
    store_up_to<Type>(out + d, load(row + d), dim_v - d);
  }
  p.lse[(tile.b * p.problem.q_heads + tile.h) * p.problem.sq + token] = log2_sum * kLn2;
}

template <class Math>
PERMATTN_INLINE void finish(const FwdTile& tile, const FwdSizes<Math>& size,
                            const FwdBuffers<Math>& buf, const Lanes& lanes) {
  const int64_t dim_v = tile.params->problem.head_dim_v;
  const int64_t row_stride = round_up(dim_v, kWidth);
  const int64_t head = tile.b * tile.params->problem.q_heads + tile.h;
  const Partial& partial = tile.group->partial;
  for (int lane = 0; lane < lanes.count; lane += kWidth) {
    const int panel = lane / (kMaxPanel * kWidth) * (kMaxPanel * kWidth);
    const int64_t width = panel_vectors(lanes, panel) * kWidth;
    const float* o = buf.o + panel * size.o_rows + (lane - panel);
    const VecF sum = load(buf.sum + lane);
    const VecF inverse = select(sum == 0.0F, VecF{}, 1.0F / sum);
    lanes_to_rows(o, width, dim_v, inverse, buf.row, row_stride);
    const int count = lanes.count - lane < kWidth ? lanes.count - lane : kWidth;
    for (int j = 0; j < count; ++j) {
      const float total = buf.sum[lane + j];
      const float log2_sum =
          total == 0.0F ? -kInfinity : buf.top[lane + j] + __builtin_log2f(total);
      float* row = buf.row + j * row_stride;
      if (partial.rows == nullptr) {
        write_row<typename Math::Type>(tile, lanes.token[lane + j], row, log2_sum);
        continue;
      }
      const int64_t place = head * partial.num_slots + lanes.slot[lane + j];
      partial.log2_sum[place] = log2_sum;
      for (int64_t d = 0; d < dim_v; d += kWidth) {
        store_up_to<Float32>(partial.rows + place * dim_v + d, load(row + d), dim_v - d);
      }
    }
  }
}

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
  for (int64_t i = 0; i < lanes_used * size.o_rows; i += kWidth) store(buf.o + i, VecF{});
  for (int i = 0; i < lanes_used; i += kWidth) {
    store(buf.top + i, splat(-kInfinity));
    store(buf.sum + i, VecF{});
  }
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
  finish<Math>(tile, size, buf, lanes);
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
