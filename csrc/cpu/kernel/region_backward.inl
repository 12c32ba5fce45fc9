// Backward of H heads, region of queries by region of queries: scores once, then
//   dQ^T += K^T dS^T with queries in lanes, and dK += dS^T Q, dV += P^T dO with columns in lanes.
// dK and dV of all key regions of a task grow in scratch, in the order of the graph's rows.

// What meets the keys of a chunk.
struct QueryPanel {
  float *q, *dout, *q_rows, *dout_rows;  // as B[step][lane], and as [query][column][H]
  float *p, *ds;                         // [key][lane]
  float *dq, *lse, *delta;               // dQ^T [column][lane]; by lane
};

template <class Math, int H>
struct RegionBwdBuffers : QueryPanel {
  PackedRegions<Math, H> packed;
  float* row;
  uint8_t* touched;  // regions whose sums have begun
  float* sums;       // by region: dK [key][column][H], then dV; null where a task wants none
  std::byte* end;

  RegionBwdBuffers(const RegionParams& params, std::byte* scratch) : packed(params, true) {
    const RowSizes<Math, H>& size = packed.size();
    constexpr int64_t kQueries = kMaxLanes / H;
    Carver carver{scratch};
    q = carver.floats(kMaxLanes * size.steps);
    dout = carver.floats(kMaxLanes * params.head_dim_v);
    q_rows = carver.floats(kQueries * size.key);
    dout_rows = carver.floats(kQueries * size.value);
    p = carver.floats((kRegionChunk + kRegionSlack) * kMaxLanes);
    ds = carver.floats((kRegionChunk + kRegionSlack) * kMaxLanes);
    dq = carver.floats((params.head_dim + kRowSlack) * kMaxLanes);
    lse = carver.floats(kMaxLanes);
    delta = carver.floats(kMaxLanes);
    row = carver.floats(kWidth * kMaxHeadDim);
    touched = reinterpret_cast<uint8_t*>(carver.floats(params.kv_grid.num_regions() / 4 + 1));
    packed.carve(carver);
    sums = carver.floats(params.kv_grid.num_regions() * size.region);
    end = carver.next;
  }
};

template <class Math, int H>
size_t region_backward_scratch(const RegionParams& p) {
  const RegionBwdBuffers<Math, H> buffers(p, nullptr);
  return static_cast<size_t>(buffers.end - static_cast<std::byte*>(nullptr));
}

// P and dS of a chunk; adds to the gradients of the weights of its places.
template <class Math, int Vectors>
PERMATTN_INLINE void slopes(const RegionParams& p, const KeyChunk& chunk, float* s, float* ds,
                            const float* lane_lse, const float* lane_delta, float* dweights) {
  const float c = p.scale * kLog2E;
  VecF lse[Vectors], delta[Vectors];
  for (int y = 0; y < Vectors; ++y) {
    lse[y] = load(lane_lse + y * kWidth);
    delta[y] = load(lane_delta + y * kWidth);
  }
  if (p.weights == nullptr) {
    for (int i = 0; i < chunk.count * Vectors; i += Vectors) {
#pragma GCC unroll 4
      for (int y = 0; y < Vectors; ++y) {
        const int64_t at = (i + y) * kWidth;
        const VecF prob = exp2_accurate(load(s + at) * c - lse[y]);
        store(s + at, prob);
        store(ds + at, prob * (load(ds + at) - delta[y]));
      }
    }
    return;
  }
  for (int piece = 0; piece < chunk.num_pieces; ++piece) {
    const Piece& rows = chunk.pieces[piece];
    const float weight = chunk.weight[rows.row];
    VecF total{};
    for (int i = rows.row; i < rows.row + rows.count; ++i) {
      for (int y = 0; y < Vectors; ++y) {
        const int64_t at = (i * Vectors + y) * kWidth;
        const VecF score = load(s + at), slope = load(ds + at);
        const VecF prob = exp2_accurate(score * (c * weight) - lse[y]);
        const VecF dscore = prob * (slope * weight - delta[y]);
        total += dscore * (score * p.scale) + prob * slope;
        store(s + at, prob * weight);
        store(ds + at, dscore * weight);
      }
    }
    float sum = 0.0F;
    for (int i = 0; i < kWidth; ++i) sum += total[i];
    if (dweights != nullptr) dweights[rows.place] += sum;
  }
}

template <class Math, int H, int Vectors>
static __attribute__((noinline)) void attend_keys_backward(const RegionParams& p,
                                                           const QueryPanel& buf,
                                                           const KeyChunk& chunk, float* dweights,
                                                           bool wants_dq, bool first) {
  multiply_rows<Math, H, Vectors>(chunk.keys, buf.q, buf.p, chunk.count, p.head_dim);
  multiply_rows<Math, H, Vectors>(chunk.values, buf.dout, buf.ds, chunk.count, p.head_dim_v);
  slopes<Math, Vectors>(p, chunk, buf.p, buf.ds, buf.lse, buf.delta, dweights);
  if (wants_dq) {
    multiply_columns<Math, H, Vectors>(chunk.keys, buf.ds, buf.dq, p.head_dim, chunk.count, !first);
  }
}

// dK and dV of the regions in a chunk.
template <class Math, int H>
PERMATTN_INLINE void add_to_keys(const RegionBwdBuffers<Math, H>& buf, const KeyChunk& chunk,
                                 int64_t lanes, int64_t queries) {
  using Arithmetic = typename Steps<Math>::Arithmetic;
  const RowSizes<Math, H>& size = buf.packed.size();
  for (int i = 0; i < chunk.num_pieces; ++i) {
    const Piece& piece = chunk.pieces[i];
    float* dk = buf.sums + piece.region * size.region;
    float* dv = dk + size.keys * size.key;
    if (buf.touched[piece.region] == 0) {
      buf.touched[piece.region] = 1;
      for (int64_t j = 0; j < size.region; j += kWidth) store(dk + j, VecF{});
    }
    add_products<Arithmetic, H>(buf.ds + piece.row * lanes, lanes, buf.q_rows,
                                dk + piece.key * size.key, size.key, piece.count, queries);
    add_products<Arithmetic, H>(buf.p + piece.row * lanes, lanes, buf.dout_rows,
                                dv + piece.key * size.value, size.value, piece.count, queries);
  }
}

// Queries [first, first + count) of a box: log-sum-exps in log2, and rowsum(out * dout) - dlse, by
// lane; lanes without a query have probabilities of 0.
template <class Type, int H>
PERMATTN_INLINE void read_query_sums(const RegionBwdTask& task, const Box& box, int64_t first,
                                     int64_t count, int64_t lanes, float* lane_lse,
                                     float* lane_delta) {
  using Storage = typename Type::Storage;
  const RegionBwdParams& b = *task.params;
  const RegionParams& p = b.forward;
  const MapRows<Storage> out(p.out, task.b, task.m, p.head_dim_v);
  const MapRows<Storage> dout(b.dout, task.b, task.m, p.head_dim_v);
  Copies<Storage> copies;
  for (int64_t i = count * H; i < lanes; ++i) {
    lane_lse[i] = kInfinity;
    lane_delta[i] = 0.0F;
  }
  Cell cell(box, first);
  for (int64_t i = 0; i < count; ++i, cell.next()) {
    for (int h = 0; h < H; ++h) {
      const Storage* x = out.row(cell.offset(p.out), h, copies.rows[0]);
      const Storage* y = dout.row(cell.offset(b.dout), h, copies.rows[1]);
      VecF sum{};
      for (int64_t d = 0; d < p.head_dim_v; d += kWidth) {
        const int64_t left = p.head_dim_v - d;
        sum += load_up_to<Type>(x + d, left) * load_up_to<Type>(y + d, left);
      }
      float total = 0.0F;
      for (int j = 0; j < kWidth; ++j) total += sum[j];
      const int64_t head = (task.b * p.heads + task.m + h) * p.q_grid.num_tokens();
      const int64_t at = head + cell.token(p.q_grid);
      lane_lse[i * H + h] = p.lse[at] == -kInfinity ? kInfinity : p.lse[at] * kLog2E;
      lane_delta[i * H + h] = total - b.dlse[at];
    }
  }
}

template <class Math, int H>
PERMATTN_INLINE void write_dq(const RegionBwdTask& task, const RegionBwdBuffers<Math, H>& buf,
                              const Box& box, int64_t first, int64_t count, int vectors) {
  const RegionParams& p = task.params->forward;
  const MapView& dq = task.params->dq;
  const int64_t row_stride = padded(p.head_dim);
  auto* base =
      static_cast<typename Math::Storage*>(dq.data) + task.b * dq.stride_b + task.m * dq.stride_m;
  Cell cell(box, first);
  for (int y = 0; y < vectors; ++y) {
    lanes_to_rows(buf.dq + y * kWidth, vectors * kWidth, p.head_dim, splat(p.scale), buf.row,
                  row_stride);
    for (int j = 0; j < kWidth / H && y * (kWidth / H) + j < count; ++j, cell.next()) {
      for (int h = 0; h < H; ++h) {
        write_map_row<typename Math::Type>(base + cell.offset(dq) + h * dq.stride_m, dq.stride_d,
                                           buf.row + (j * H + h) * row_stride, p.head_dim);
      }
    }
  }
}

// Rows [cell][column][H] times a factor to the cells of a region; null rows are zeros.
template <class Math, int H>
PERMATTN_INLINE void write_region(const RegionBwdTask& task, const MapView& map, const Box& box,
                                  int64_t dim, const float* rows, float factor, float* row) {
  auto* base = static_cast<typename Math::Storage*>(map.data) + task.b * map.stride_b +
               task.m * map.stride_m;
  const int64_t row_stride = padded(dim);
  if (rows == nullptr) {
    for (int64_t i = 0; i < H * row_stride; i += kWidth) store(row + i, VecF{});
  }
  const int64_t cells = box.cells();
  Cell cell(box, 0);
  for (int64_t i = 0; i < cells; ++i, cell.next()) {
    for (int64_t d = 0; d < dim && rows != nullptr; d += kWidth) {
      VecF r[H];
      for (int h = 0; h < H; ++h) {
        r[h] = load(rows + (i * row_stride + d) * H + h * kWidth) * factor;
      }
      heads_apart<H>(r);
      for (int h = 0; h < H; ++h) store(row + h * row_stride + d, r[h]);
    }
    for (int h = 0; h < H; ++h) {
      write_map_row<typename Math::Type>(base + cell.offset(map) + h * map.stride_m, map.stride_d,
                                         row + h * row_stride, dim);
    }
  }
}

template <class Math, int H>
PERMATTN_INLINE void write_keys(const RegionBwdTask& task, const RegionBwdBuffers<Math, H>& buf) {
  const RegionParams& p = task.params->forward;
  const RowSizes<Math, H>& size = buf.packed.size();
  for (int64_t region = task.kv_first; region < task.kv_last; ++region) {
    const Box box(p.kv_grid, region);
    const float* dk = buf.touched[region] != 0 ? buf.sums + region * size.region : nullptr;
    const float* dv = dk == nullptr ? nullptr : dk + size.keys * size.key;
    write_region<Math, H>(task, task.params->dk, box, p.head_dim, dk, p.scale, buf.row);
    write_region<Math, H>(task, task.params->dv, box, p.head_dim_v, dv, 1.0F, buf.row);
  }
}

// Queries [query, query + count) of region r.
template <class Math, int H>
PERMATTN_INLINE void backward_queries(const RegionBwdTask& task, RegionBwdBuffers<Math, H>& buf,
                                      KeyChunk& chunk, const Box& box, int64_t r, int64_t query,
                                      int64_t count) {
  using Type = typename Math::Type;
  using Arithmetic = typename Steps<Math>::Arithmetic;
  const RegionBwdParams& b = *task.params;
  const RegionParams& p = b.forward;
  const auto vectors = static_cast<int>((count * H + kWidth - 1) / kWidth);
  const bool wants_dq = task.wants_dq && r >= task.first && r < task.last;
  float* dweights =
      b.dweights == nullptr || !wants_dq
          ? nullptr
          : b.dweights + ((task.b * p.heads + task.m) * p.q_grid.num_regions() + r) * p.topk;
  // Queries are packed once somebody is known to be seen.
  bool first = true;
  const auto flush = [&] {
    if (first) {
      pack_queries<Math, H>(p.q, task.b, task.m, p.head_dim, box, query, count, vectors, 1.0F,
                            buf.q);
      pack_queries<Math, H>(b.dout, task.b, task.m, p.head_dim_v, box, query, count, vectors, 1.0F,
                            buf.dout);
      read_query_sums<Type, H>(task, box, query, count, vectors * kWidth, buf.lse, buf.delta);
      if (task.wants_dkv) {
        pack_rows_of<Math, H>(p.q, task.b, task.m, p.head_dim, box, query, count, buf.q_rows);
        pack_rows_of<Math, H>(b.dout, task.b, task.m, p.head_dim_v, box, query, count,
                              buf.dout_rows);
      }
    }
    chunk.seal();
    with_vectors(vectors, [&](auto v) {
      attend_keys_backward<Arithmetic, H, decltype(v)::value>(p, buf, chunk, dweights, wants_dq,
                                                              first);
    });
    if (task.wants_dkv) add_to_keys(buf, chunk, vectors * kWidth, count);
    first = false;
    chunk.clear();
  };
  const auto wanted = [&](int32_t region) {
    return wants_dq || (region >= task.kv_first && region < task.kv_last);
  };
  stream_regions(p, task.b, task.m, r, buf.packed, chunk, wanted, flush);
  if (!wants_dq) return;
  if (first) {
    for (int64_t i = 0; i < p.head_dim * vectors * kWidth; i += kWidth) store(buf.dq + i, VecF{});
  }
  write_dq(task, buf, box, query, count, vectors);
}

template <class Math, int H>
void region_backward(const RegionBwdTask& task, std::byte* scratch) {
  constexpr int64_t kQueries = kMaxLanes / H;
  const RegionParams& p = task.params->forward;
  RegionBwdBuffers<Math, H> buf(p, scratch);
  buf.packed.clear();
  __builtin_memset(buf.touched, 0, p.kv_grid.num_regions());
  KeyChunk chunk;
  // Sums of keys are over all queries.
  const int64_t begin = task.wants_dkv ? 0 : task.first;
  const int64_t end = task.wants_dkv ? p.q_grid.num_regions() : task.last;
  for (int64_t r = begin; r < end; ++r) {
    const Box box(p.q_grid, r);
    const int64_t cells = box.cells();
    for (int64_t query = 0; query < cells; query += kQueries) {
      const int64_t count = cells - query < kQueries ? cells - query : kQueries;
      backward_queries(task, buf, chunk, box, r, query, count);
    }
  }
  if (task.wants_dkv) write_keys(task, buf);
}
