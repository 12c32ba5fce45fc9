// Forward of one tile on quantised rows. Rows lie in slot order, so the listed blocks are read as
// they are, group after group: the slots that share a scale. Integer scores are exact; a lane turns
// them into log2 units by one factor a group.

template <class Products>
struct QuantSizes {
  int64_t steps;      // of Q K^T
  int64_t k_stride;   // bytes per row of queries and keys
  int64_t columns;    // numbers per row of integer values
  int64_t v_stride;   // floats per step of packed values
  int64_t keys;       // per group
  int64_t row_bytes;  // of values that are no integers
  int32_t dim_v;

  explicit QuantSizes(const FwdParams& p) {
    const Problem& problem = p.problem;
    k_stride = round_up(problem.head_dim, 64);
    steps = Products::kStepBlock == 1 ? (problem.head_dim + 3) / 4 : k_stride / 4;
    columns = round_up(problem.head_dim_v, 16);
    v_stride = columns + 16;
    keys = p.quantised->kv_rows;
    dim_v = problem.head_dim_v;
    row_bytes = p.quantised->values[0].group_bytes / keys;
  }
};

template <class Products>
struct QuantBuffers {
  Carver carver;
  Sums sums;
  float* q;       // [step][lane] by panel, four bytes a step
  float* start;   // by lane: where its integer sums begin
  float* factor;  // by lane: its scale, and log2(e) * scale
  float* s;       // [key][lane]
  float* v;       // packed values that are no integers
  float* o;       // [column][lane] of one panel and group

  QuantBuffers(const QuantSizes<Products>& size, std::byte* scratch)
      : carver{scratch}, sums(carver, size.dim_v) {
    constexpr int64_t kPanel = kMaxPanel * kWidth;
    const int64_t keys = round_up(size.keys, 64) + kRowSlack;
    q = carver.floats(kTileLanes * round_up(size.steps, kWidth));
    start = carver.floats(kTileLanes);
    factor = carver.floats(kTileLanes);
    s = carver.floats(keys * kPanel);
    v = carver.floats(keys * size.v_stride);
    o = carver.floats((round_up(size.dim_v, 16) + kRowSlack) * kPanel);
  }
};

template <class Products>
size_t quantised_scratch(const FwdParams& p) {
  const QuantBuffers<Products> buffers(QuantSizes<Products>(p), nullptr);
  return static_cast<size_t>(buffers.carver.next - static_cast<std::byte*>(nullptr));
}

// The keys and values that share a scale, and who sees them.
struct KeyGroup {
  int count;
  bool masked;  // some key is not seen by every lane
  const std::byte* k;
  const std::byte* v;
  float k_scale;
  const float* v_scale;
  uint64_t seen[kMaxKeysPerScale][kLaneWords];  // bits past the lanes in use are set
};

// Who sees the slots whose tokens are at `token`; `left` of them exist. False when nobody does.
PERMATTN_INLINE bool read_key_group(KeyGroup& group, const int32_t* token, int64_t left,
                                    uint64_t num_tokens, bool full, const LaneRange& range,
                                    const Lanes& lanes) {
  const bool all = full || range.width == UINT32_MAX;
  const int64_t there = left < group.count ? left : group.count;
  bool hole = there < group.count;
  for (int64_t i = 0; i < there; ++i) hole |= static_cast<uint32_t>(token[i]) >= num_tokens;
  group.masked = hole || !all;
  if (!group.masked) return true;
  group.masked = hole;
  bool any = false;
  for (int64_t i = 0; i < group.count; ++i) {
    uint64_t* seen = group.seen[i];
    if (i >= there || static_cast<uint32_t>(token[i]) >= num_tokens) {
      for (int w = 0; w < kLaneWords; ++w) seen[w] = ~lanes.valid[w];
    } else if (all) {
      for (int w = 0; w < kLaneWords; ++w) seen[w] = ~uint64_t{0};
      any = true;
    } else {
      any |= lanes_that_see(lanes, static_cast<uint32_t>(token[i]), range, seen);
      for (int w = 0; w < kLaneWords; ++w) group.masked |= seen[w] != ~uint64_t{0};
    }
  }
  return any;
}

// Queries of the tile in lanes, and what goes with them.
template <class Products>
PERMATTN_INLINE void pack_queries(const FwdTile& tile, const QuantSizes<Products>& size,
                                  const QuantBuffers<Products>& buf, const Lanes& lanes) {
  using Bytes = typename Products::Bytes;
  const FwdParams& p = *tile.params;
  const QuantisedOperands& quantised = *p.quantised;
  const PreparedRows& queries = quantised.queries[p.problem.parts[tile.group->parts[0]].group];
  // A negative scale is moved into Q, so that the largest score is the largest product.
  const float scale = p.problem.scale;
  const int64_t heads = p.problem.q_heads;
  for (int lane = 0; lane < lanes.count; lane += kWidth) {
    const int panel = lane / (kMaxPanel * kWidth) * (kMaxPanel * kWidth);
    const int64_t width = panel_vectors(lanes, panel) * kWidth;
    float* to = buf.q + panel * size.steps + (lane - panel);
    const std::byte* row[kWidth];
    for (int j = 0; j < kWidth; ++j) {
      row[j] = nullptr;
      buf.factor[lane + j] = 0.0F;
      if (lane + j >= lanes.count) continue;
      const int64_t slot = lanes.slot[lane + j];
      const int64_t group = slot / quantised.q_rows;
      row[j] =
          queries.group(tile.b, tile.h, heads, group) + slot % quantised.q_rows * size.k_stride;
      buf.factor[lane + j] =
          *queries.scale(tile.b, tile.h, heads, group) * (__builtin_fabsf(scale) * kLog2E);
    }
    VecI sum{};
    for (int64_t d = 0; d < size.steps; d += kWidth) {
      VecF r[kWidth];
      for (int j = 0; j < kWidth; ++j) {
        r[j] = VecF{};
        if (row[j] == nullptr || scale == 0.0F) continue;
        r[j] = load_unaligned(reinterpret_cast<const float*>(row[j] + 4 * d));
        typedef int8_t VecB __attribute__((vector_size(kWidth * 4), may_alias));
        if (scale < 0.0F) r[j] = reinterpret_cast<VecF>(-reinterpret_cast<VecB>(r[j]));
      }
      transpose(r);
      const int64_t n = size.steps - d < kWidth ? size.steps - d : kWidth;
      for (int64_t j = 0; j < n; ++j) {
        store(to + (d + j) * width, r[j]);
        sum =
            Bytes::add(sum, Bytes::as_unsigned(VecI{} + kOneBytes), Bytes::as_signed(as_int(r[j])));
      }
    }
    store(buf.start + lane, as_float(kExactSumBits - kKeyBias * sum));
  }
}

// kExactSum + score of every key and lane of a panel; -inf where it is not seen, and in the rows
// that fill the last quad.
template <class Products, int Vectors>
PERMATTN_INLINE void exact_scores(const QuantSizes<Products>& size,
                                  const QuantBuffers<Products>& buf, const KeyGroup& group,
                                  int lane) {
  Products::template scores<Vectors>(group.k, size.k_stride, buf.q + lane * size.steps,
                                     buf.start + lane, buf.s, group.count, size.steps);
  if (group.masked) hide_unseen<Vectors>(buf.s, group, lane);
  for (int64_t i = group.count; i < round_up(group.count, 4); ++i) {
    for (int y = 0; y < Vectors; ++y) store(buf.s + (i * Vectors + y) * kWidth, splat(-kInfinity));
  }
}

// How a panel's scores of a group become probabilities relative to their largest.
template <int Vectors>
struct RowBlock {
  VecF centre[Vectors];  // the largest score, finite
  VecF factor[Vectors];  // score to log2
  VecF weight[Vectors];  // of a probability in units of 1 / `high`, relative to the reference

  template <class Buffers>
  PERMATTN_METHOD RowBlock(const Buffers& buf, const KeyGroup& group, int lane, int64_t dim_v,
                           float high) {
    constexpr int kLanes = Vectors * kWidth;
    const Sums& sums = buf.sums;
    VecF most[Vectors], wanted[Vectors];
    for (int y = 0; y < Vectors; ++y) most[y] = splat(-kInfinity);
    for (int i = 0; i < group.count; ++i) {
      for (int y = 0; y < Vectors; ++y) {
        most[y] = maximum(load(buf.s + i * kLanes + y * kWidth), most[y]);
      }
    }
    for (int y = 0; y < Vectors; ++y) {
      // Where a scale is 0 all scores are, and any factor will do that keeps -inf.
      factor[y] = maximum(splat(1e-37F), load(buf.factor + lane + y * kWidth) * group.k_scale);
      centre[y] = maximum(splat(kExactSum - 0x1p22F), most[y]);
      weight[y] = (most[y] - kExactSum) * factor[y];
      wanted[y] = round_to_integer(weight[y]);
    }
    raise_reference<Vectors>(wanted, sums.top + lane, sums.sum + lane, sums.o + lane * sums.o_rows,
                             dim_v);
    for (int y = 0; y < Vectors; ++y) {
      const VecF reference = maximum(splat(-1e30F), load(sums.top + lane + y * kWidth));
      weight[y] = exp2_accurate(weight[y] - reference) * (1.0F / high);
    }
  }
};

// P and V as integers.
template <class Products>
struct IntegerValues {
  using Bytes = typename Products::Bytes;

  PERMATTN_INLINE void pack(const QuantSizes<Products>&, const QuantBuffers<Products>&,
                            const KeyGroup&) {}

  template <int Vectors>
  PERMATTN_INLINE void add(const QuantSizes<Products>& size, const QuantBuffers<Products>& buf,
                           const KeyGroup& group, int lane, Format format) {
    constexpr int kLanes = Vectors * kWidth;
    const float high = probability_high_of(format);
    const float log2_high = __builtin_log2f(high);
    const RowBlock<Vectors> block(buf, group, lane, size.dim_v, high);
    const int quads = (group.count + 3) / 4;
    VecI count[Vectors] = {};
    // Row i of P overwrites rows of S that have been read.
    for (int i = 0; i < quads; ++i) {
#pragma GCC unroll 4
      for (int y = 0; y < Vectors; ++y) {
        const float* s = buf.s + 4 * i * kLanes + y * kWidth;
        VecI packed{};
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const VecF x = (load(s + j * kLanes) - block.centre[y]) * block.factor[y] + log2_high;
          packed |= to_integer(exp2_accurate(x)) << (8 * j);
        }
        store(buf.s + i * kLanes + y * kWidth, as_float(packed));
        count[y] =
            Bytes::add(count[y], Bytes::as_unsigned(packed), Bytes::as_signed(VecI{} + kOneBytes));
      }
    }
    float* sum = buf.sums.sum + lane;
    for (int y = 0; y < Vectors; ++y) {
      const VecF total = __builtin_convertvector(count[y], VecF) * block.weight[y];
      store(sum + y * kWidth, load(sum + y * kWidth) + total);
    }
    const ValueSums<Vectors> sums{buf.sums.o + lane * buf.sums.o_rows, group.v_scale, block.weight};
    Products::template values<Vectors>(group.v, size.columns, buf.s, quads, size.dim_v, buf.o,
                                       sums);
  }
};

// Values as rows of `Math`'s type, packed group by group.
template <class Products, class Math>
struct FloatRows {
  using Storage = typename Math::Storage;

  PERMATTN_INLINE void pack(const QuantSizes<Products>& size, const QuantBuffers<Products>& buf,
                            const KeyGroup& group) {
    int32_t row[kMaxKeysPerScale];
    for (int i = 0; i < group.count; ++i) row[i] = i;
    const TensorView view{const_cast<std::byte*>(group.v), 0, 0, size.dim_v};
    Math::pack_columns(RowsOf<Storage>(view, 0, 0), row, group.count, size.dim_v, size.v_stride,
                       buf.v);
  }
};

// P and V as they are.
template <class Products, class Math>
struct PlainValues : FloatRows<Products, Math> {
  template <int Vectors>
  PERMATTN_INLINE void add(const QuantSizes<Products>& size, const QuantBuffers<Products>& buf,
                           const KeyGroup& group, int lane, Format) {
    VecF factor[Vectors];
    for (int y = 0; y < Vectors; ++y) {
      factor[y] = maximum(splat(1e-37F), load(buf.factor + lane + y * kWidth) * group.k_scale);
    }
    for (int64_t i = 0; i < round_up(group.count, 4); ++i) {
      for (int y = 0; y < Vectors; ++y) {
        float* s = buf.s + (i * Vectors + y) * kWidth;
        store(s, (load(s) - kExactSum) * factor[y]);
      }
    }
    add_scores<Math, Vectors>(buf.sums, buf.s, group.count, lane, 1.0F, buf.v, size.v_stride,
                              size.dim_v);
  }
};

// P and V rounded to FP8, multiplied in `Math`, which holds such numbers exactly.
template <class Products, class Math>
struct Fp8Values : FloatRows<Products, Math> {
  template <int Vectors>
  PERMATTN_INLINE void add(const QuantSizes<Products>& size, const QuantBuffers<Products>& buf,
                           const KeyGroup& group, int lane, Format format) {
    constexpr int kLanes = Vectors * kWidth;
    const float high = probability_high_of(format);
    const float log2_high = __builtin_log2f(high);
    const RowBlock<Vectors> block(buf, group, lane, size.dim_v, high);
    VecF count[Vectors] = {};
    for (int64_t i = 0; i < round_up(group.count, 4); ++i) {
      for (int y = 0; y < Vectors; ++y) {
        float* s = buf.s + i * kLanes + y * kWidth;
        const VecF x = (load(s) - block.centre[y]) * block.factor[y] + log2_high;
        const VecF p = round_to_e4m3(minimum(splat(high), exp2_accurate(x)));
        count[y] += p;
        store(s, p);
      }
    }
    Math::template narrow<Vectors>(buf.s, group.count);
    const int64_t rows = round_up(size.dim_v, 16) + kRowSlack;
    for (int64_t i = 0; i < rows * Vectors; ++i) store(buf.o + i * kWidth, VecF{});
    Math::template values<Vectors>(buf.v, size.v_stride, buf.s, buf.o, group.count, size.dim_v);
    float* sum = buf.sums.sum + lane;
    float* o = buf.sums.o + lane * buf.sums.o_rows;
    for (int y = 0; y < Vectors; ++y) {
      store(sum + y * kWidth, load(sum + y * kWidth) + count[y] * block.weight[y]);
      for (int64_t d = 0; d < size.dim_v; ++d) {
        const int64_t at = d * kLanes + y * kWidth;
        const VecF factor = splat(group.v_scale[d]) * block.weight[y];
        store(o + at, load(o + at) + load(buf.o + at) * factor);
      }
    }
  }
};

template <class Products, class Values, int Vectors>
static __attribute__((noinline)) void attend_group(const QuantSizes<Products>& size,
                                                   const QuantBuffers<Products>& buf,
                                                   const KeyGroup& group, int lane, Format format) {
  exact_scores<Products, Vectors>(size, buf, group, lane);
  Values::template add<Vectors>(size, buf, group, lane, format);
}

template <class Products, class Values>
PERMATTN_INLINE void attend_panels(const QuantSizes<Products>& size,
                                   const QuantBuffers<Products>& buf, const KeyGroup& group,
                                   const Lanes& lanes, Format format) {
  Values::pack(size, buf, group);
  for (int lane = 0; lane < lanes.count; lane += kMaxPanel * kWidth) {
    const int vectors = panel_vectors(lanes, lane);
    if (vectors == 1) {
      attend_group<Products, Values, 1>(size, buf, group, lane, format);
#if PERMATTN_WIDTH == 16
    } else if (vectors == 2) {
      attend_group<Products, Values, 2>(size, buf, group, lane, format);
    } else if (vectors == 3) {
      attend_group<Products, Values, 3>(size, buf, group, lane, format);
#endif
    } else {
      attend_group<Products, Values, kMaxPanel>(size, buf, group, lane, format);
    }
  }
}

// Every group of the listed blocks of one part.
template <class Products, class Values>
PERMATTN_INLINE void attend_part(const FwdTile& tile, int32_t number,
                                 const QuantSizes<Products>& size,
                                 const QuantBuffers<Products>& buf, const Lanes& lanes,
                                 KeyGroup& group) {
  const FwdParams& p = *tile.params;
  const PlanPart& part = p.problem.parts[number];
  const PreparedRows& keys = p.quantised->keys[number];
  const PreparedRows& values = p.quantised->values[number];
  const IndexView& index = part.index;
  const int64_t row = tile.slot / index.block_row;
  if (row >= index.num_full.size) return;
  const int32_t* offsets = index.row_offsets.row(tile.b, tile.h);
  const int64_t capacity = index.indices.size;
  const int64_t begin = offsets[row] < 0 ? 0 : offsets[row];
  const int64_t end = offsets[row + 1] > capacity ? capacity : offsets[row + 1];
  const int64_t full_end = begin + index.num_full.row(tile.b, tile.h)[row];
  const int32_t* block_of_entry = index.indices.row(tile.b, tile.h);
  const int32_t* token_of_slot = part.kv_perm.token_of_slot.row(tile.b, tile.h);
  const int64_t num_slots = part.kv_perm.token_of_slot.size;
  const uint64_t num_tokens = part.kv_perm.slot_of_token.size;
  const LaneRange range = lanes_are_queries(part.band);
  const int64_t heads = p.problem.q_heads;
  for (int64_t entry = begin; entry < end; ++entry) {
    const bool full = entry < full_end;
    const int64_t block = block_of_entry[entry];
    const int64_t first = block * index.block_col;
    if (block < 0 || first >= num_slots || (!full && range.empty)) continue;
    const int64_t last = first + index.block_col < num_slots ? first + index.block_col : num_slots;
    for (int64_t slot = first; slot < last; slot += group.count) {
      if (!read_key_group(group, token_of_slot + slot, last - slot, num_tokens, full, range,
                          lanes)) {
        continue;
      }
      const int64_t place = slot / group.count;
      group.k = keys.group(tile.b, tile.h, heads, place);
      group.k_scale = *keys.scale(tile.b, tile.h, heads, place);
      group.v = values.group(tile.b, tile.h, heads, place);
      group.v_scale =
          values.scales == nullptr ? nullptr : values.scale(tile.b, tile.h, heads, place);
      attend_panels<Products, Values>(size, buf, group, lanes, p.quantised->pv);
    }
  }
}

template <class Products, class Values>
void forward_quantised_tile(const FwdTile& tile, std::byte* scratch) {
  const FwdParams& p = *tile.params;
  const QuantSizes<Products> size(p);
  const QuantBuffers<Products> buf(size, scratch);
  Lanes lanes;
  read_lanes(lanes, tile.group->q_perm, tile.b, tile.h, tile.slot, tile.size);
  if (lanes.count == 0) return;
  pack_queries(tile, size, buf, lanes);
  buf.sums.clear(static_cast<int>(round_up(lanes.count, kWidth)));
  KeyGroup group;
  group.count = static_cast<int>(size.keys);
  for (int i = 0; i < tile.group->num_parts; ++i) {
    attend_part<Products, Values>(tile, tile.group->parts[i], size, buf, lanes, group);
  }
  switch (p.problem.dtype) {
    case Dtype::kFloat32:
      return finish<Float32>(tile, buf.sums, lanes);
    case Dtype::kBFloat16:
      return finish<BFloat16>(tile, buf.sums, lanes);
    case Dtype::kFloat16:
      return finish<Float16>(tile, buf.sums, lanes);
  }
}

template <class Products>
void add_integer_kernels(Kernels& kernels) {
  constexpr auto kind = static_cast<int32_t>(ValueKind::kInteger);
  kernels.forward_quantised[kind] = forward_quantised_tile<Products, IntegerValues<Products>>;
  kernels.quantised_scratch[kind] = quantised_scratch<Products>;
  kernels.value_layout = Products::kValueLayout;
}

// V in the numbers of `Math`, for inputs of its type.
template <class Products, class Math>
void add_plain_kernels(Kernels& kernels) {
  constexpr auto kind = static_cast<int32_t>(ValueKind::kPlain);
  kernels.forward_quantised[kind] = forward_quantised_tile<Products, PlainValues<Products, Math>>;
  kernels.quantised_scratch[kind] = quantised_scratch<Products>;
}

// `Math` takes bfloat16 rows, whatever the inputs' type.
template <class Products, class Math>
void add_fp8_kernels(Kernels& kernels) {
  constexpr auto kind = static_cast<int32_t>(ValueKind::kFp8);
  kernels.forward_quantised[kind] = forward_quantised_tile<Products, Fp8Values<Products, Math>>;
  kernels.quantised_scratch[kind] = quantised_scratch<Products>;
}
