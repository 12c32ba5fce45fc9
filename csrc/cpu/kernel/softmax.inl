// One softmax over all that a tile sees: its sums, the lazy reference maximum, other groups'
// partial results, and rows back to token order. Source: FlashAttention-2 (online softmax, rescale
// late); the lazy reference maximum is ours: it moves only when a score passes it by 2^16 and is an
// integer, so that rescaling is exact.

constexpr float kRescaleAt = 16.0F;

// What a tile has summed so far, panel by panel: O^T [column][lane], and by lane the reference (in
// log2) and the sum of 2^(score - reference). `row` is scratch for kWidth rows of O.
struct Sums {
  float *o, *top, *sum, *row;
  int64_t o_rows;  // rows of O^T with slack

  Sums(Carver& carver, int64_t dim_v) : o_rows(dim_v + kRowSlack) {
    o = carver.floats(kTileLanes * o_rows);
    top = carver.floats(kTileLanes);
    sum = carver.floats(kTileLanes);
    row = carver.floats(kWidth * round_up(dim_v, kWidth));
  }

  PERMATTN_METHOD void clear(int lanes) const {
    for (int64_t i = 0; i < lanes * o_rows; i += kWidth) store(o + i, VecF{});
    for (int i = 0; i < lanes; i += kWidth) {
      store(top + i, splat(-kInfinity));
      store(sum + i, VecF{});
    }
  }
};

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

// `wanted`: the largest scores of the panel, rounded to integers.
template <int Vectors>
PERMATTN_INLINE void raise_reference(const VecF* wanted, float* top, float* sum, float* o,
                                     int64_t dim_v) {
  alignas(64) float want[Vectors * kWidth];
  bool late = false;
  for (int y = 0; y < Vectors; ++y) {
    store(want + y * kWidth, wanted[y]);
    late |= any_greater(wanted[y], load(top + y * kWidth) + kRescaleAt);
  }
  if (__builtin_expect(late, 0)) rescale<Vectors>(want, top, sum, o, dim_v);
}

template <int Vectors, class Streamed>
PERMATTN_INLINE void hide_unseen(float* s, const Streamed& chunk, int first_lane) {
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

// Scores of one panel of lanes (in units of 1 / c of log2) against `count` streamed rows, and the
// values of these rows, into the sums.
template <class Math, int Vectors>
PERMATTN_INLINE void add_scores(const Sums& sums, float* s, int count, int first_lane, float c,
                                const float* v, int64_t v_stride, int64_t dim_v) {
  constexpr int kLanes = Vectors * kWidth;
  float* o = sums.o + first_lane * sums.o_rows;
  float* top = sums.top + first_lane;
  float* sum = sums.sum + first_lane;
  VecF high[Vectors];
  for (int y = 0; y < Vectors; ++y) high[y] = splat(-kInfinity);
  for (int i = 0; i < count; ++i) {
    for (int y = 0; y < Vectors; ++y) high[y] = maximum(load(s + i * kLanes + y * kWidth), high[y]);
  }
  for (int y = 0; y < Vectors; ++y) high[y] = round_to_integer(high[y] * c);
  raise_reference<Vectors>(high, top, sum, o, dim_v);
  VecF reference[Vectors];
  VecF total[Vectors];
  for (int y = 0; y < Vectors; ++y) {
    reference[y] = maximum(splat(-1e30F), load(top + y * kWidth));
    total[y] = load(sum + y * kWidth);
  }
  Math::template probabilities<Vectors>(s, count, c, reference, total);
  for (int y = 0; y < Vectors; ++y) store(sum + y * kWidth, total[y]);
  Math::template values<Vectors>(v, v_stride, s, o, count, dim_v);
}

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

template <class Type>
PERMATTN_INLINE void finish(const FwdTile& tile, const Sums& sums, const Lanes& lanes) {
  const int64_t dim_v = tile.params->problem.head_dim_v;
  const int64_t row_stride = round_up(dim_v, kWidth);
  const int64_t head = tile.b * tile.params->problem.q_heads + tile.h;
  const Partial& partial = tile.group->partial;
  for (int lane = 0; lane < lanes.count; lane += kWidth) {
    const int panel = lane / (kMaxPanel * kWidth) * (kMaxPanel * kWidth);
    const int64_t width = panel_vectors(lanes, panel) * kWidth;
    const float* o = sums.o + panel * sums.o_rows + (lane - panel);
    const VecF sum = load(sums.sum + lane);
    const VecF inverse = select(sum == 0.0F, VecF{}, 1.0F / sum);
    lanes_to_rows(o, width, dim_v, inverse, sums.row, row_stride);
    const int count = lanes.count - lane < kWidth ? lanes.count - lane : kWidth;
    for (int j = 0; j < count; ++j) {
      const float total = sums.sum[lane + j];
      const float log2_sum =
          total == 0.0F ? -kInfinity : sums.top[lane + j] + __builtin_log2f(total);
      float* row = sums.row + j * row_stride;
      if (partial.rows == nullptr) {
        write_row<Type>(tile, lanes.token[lane + j], row, log2_sum);
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
