// Forward of some regions of queries of H heads: S^T = K Q^T with (query, head) in lanes, so that
// the softmax needs no horizontal step; O^T += V^T P^T.

template <class Math, int H>
struct RegionFwdBuffers {
  PackedRegions<Math, H> packed;
  float *q, *s, *o, *top, *sum, *row;
  std::byte* end;

  RegionFwdBuffers(const RegionParams& p, std::byte* scratch) : packed(p, false) {
    Carver carver{scratch};
    q = carver.floats(kMaxLanes * packed.size().steps);
    s = carver.floats((kRegionChunk + kRegionSlack) * kMaxLanes);
    o = carver.floats((p.head_dim_v + kRowSlack) * kMaxLanes);
    top = carver.floats(kMaxLanes);
    sum = carver.floats(kMaxLanes);
    row = carver.floats(kWidth * padded(p.head_dim_v));
    packed.carve(carver);
    end = carver.next;
  }
};

template <class Math, int H>
size_t region_forward_scratch(const RegionParams& p) {
  const RegionFwdBuffers<Math, H> buffers(p, nullptr);
  return static_cast<size_t>(buffers.end - static_cast<std::byte*>(nullptr));
}

// As Steps::probabilities; each row, its sums apart, times its weight.
template <class Math, int Vectors>
PERMATTN_INLINE void weighted_probabilities(float* s, const KeyChunk& chunk, float c,
                                            const VecF* top, VecF* sum) {
  for (int i = 0; i < chunk.count; ++i) {
    for (int y = 0; y < Vectors; ++y) {
      float* p = s + (i * Vectors + y) * kWidth;
      const VecF e = exp2_accurate(load(p) * c - top[y]);
      sum[y] += e;
      store(p, e * chunk.weight[i]);
    }
  }
  Math::template narrow<Vectors>(s, chunk.count);
}

template <class Math, int H, int Vectors>
static __attribute__((noinline)) void attend_keys(const RegionParams& p, const float* q, float* s,
                                                  float* o, float* top, float* sum,
                                                  const KeyChunk& chunk, int64_t steps, float c,
                                                  bool first) {
  constexpr int kLanes = Vectors * kWidth;
  multiply_rows<Math, H, Vectors>(chunk.keys, q, s, chunk.count, steps);
  if (p.weights != nullptr) {
    for (int i = 0; i < chunk.count * kLanes; i += kWidth) {
      store(s + i, load(s + i) * chunk.weight[i / kLanes]);
    }
  }
  if (chunk.any_hidden) {
    for (int i = 0; i < chunk.count; ++i) {
      for (int y = 0; chunk.hidden[i] && y < Vectors; ++y) {
        store(s + i * kLanes + y * kWidth, splat(-kInfinity));
      }
    }
  }
  VecF high[Vectors];
  for (int y = 0; y < Vectors; ++y) high[y] = splat(-kInfinity);
  for (int i = 0; i < chunk.count; ++i) {
    for (int y = 0; y < Vectors; ++y) high[y] = maximum(load(s + i * kLanes + y * kWidth), high[y]);
  }
  for (int y = 0; y < Vectors; ++y) high[y] = round_to_integer(high[y] * c);
  if (first) {
    for (int y = 0; y < Vectors; ++y) store(top + y * kWidth, high[y]);
  } else {
    raise_reference<Vectors>(high, top, sum, o, p.head_dim_v);
  }
  VecF reference[Vectors];
  VecF total[Vectors];
  for (int y = 0; y < Vectors; ++y) {
    reference[y] = maximum(splat(-1e30F), load(top + y * kWidth));
    total[y] = first ? VecF{} : load(sum + y * kWidth);
  }
  if (p.weights != nullptr) {
    weighted_probabilities<Math, Vectors>(s, chunk, c, reference, total);
  } else {
    Steps<Math>::template probabilities<Vectors>(s, chunk.count, c, reference, total);
  }
  for (int y = 0; y < Vectors; ++y) store(sum + y * kWidth, total[y]);
  multiply_columns<Math, H, Vectors>(chunk.values, s, o, p.head_dim_v, chunk.count / Math::kPerStep,
                                     !first);
}

// Rows and log-sum-exps of the queries [first, first + count) of a box.
template <class Math, int H>
PERMATTN_INLINE void write_queries(const RegionTask& task, const RegionFwdBuffers<Math, H>& buf,
                                   const Box& box, int64_t first, int64_t count, int vectors) {
  using Storage = typename Math::Storage;
  const RegionParams& p = *task.params;
  const int64_t lanes = vectors * kWidth, dim = p.head_dim_v, row_stride = padded(dim);
  auto* out = static_cast<Storage*>(p.out.data) + task.b * p.out.stride_b + task.m * p.out.stride_m;
  float* lse = p.lse + (task.b * p.heads + task.m) * p.q_grid.num_tokens();
  Cell cell(box, first);
  for (int y = 0; y < vectors; ++y) {
    const VecF sum = load(buf.sum + y * kWidth);
    const VecF inverse = select(sum == 0.0F, VecF{}, 1.0F / sum);
    lanes_to_rows(buf.o + y * kWidth, lanes, dim, inverse, buf.row, row_stride);
    for (int j = 0; j < kWidth / H && y * (kWidth / H) + j < count; ++j, cell.next()) {
      const int64_t offset = cell.offset(p.out), token = cell.token(p.q_grid);
      for (int h = 0; h < H; ++h) {
        const int lane = y * kWidth + j * H + h;
        write_map_row<typename Math::Type>(out + offset + h * p.out.stride_m, p.out.stride_d,
                                           buf.row + (j * H + h) * row_stride, dim);
        const float total = buf.sum[lane];
        lse[h * p.q_grid.num_tokens() + token] =
            total == 0.0F ? -kInfinity : (buf.top[lane] + __builtin_log2f(total)) * kLn2;
      }
    }
  }
}

// Calls body with the number of vectors as a constant.
template <class Body>
PERMATTN_INLINE void with_vectors(int vectors, const Body& body) {
  if (vectors == 1) {
    body(std::integral_constant<int, 1>{});
#if PERMATTN_WIDTH == 16
  } else if (vectors == 2) {
    body(std::integral_constant<int, 2>{});
  } else if (vectors == 3) {
    body(std::integral_constant<int, 3>{});
#endif
  } else {
    body(std::integral_constant<int, kMaxPanel>{});
  }
}

template <class Math, int H>
void region_forward(const RegionTask& task, std::byte* scratch) {
  using Arithmetic = typename Steps<Math>::Arithmetic;
  constexpr int64_t kQueries = kMaxLanes / H;  // of a panel
  const RegionParams& p = *task.params;
  RegionFwdBuffers<Math, H> buf(p, scratch);
  buf.packed.clear();
  // A negative scale is moved into Q, so that the largest score is the largest product.
  const float sign = p.scale > 0.0F ? 1.0F : p.scale < 0.0F ? -1.0F : 0.0F;
  const float c = p.scale == 0.0F ? 1.0F : p.scale * sign * kLog2E;
  const int64_t steps = buf.packed.size().steps;
  const auto all = [](int32_t) { return true; };
  KeyChunk chunk;
  for (int64_t r = task.first; r < task.last; ++r) {
    const Box box(p.q_grid, r);
    const int64_t cells = box.cells();
    for (int64_t query = 0; query < cells; query += kQueries) {
      const int64_t count = cells - query < kQueries ? cells - query : kQueries;
      const auto vectors = static_cast<int>((count * H + kWidth - 1) / kWidth);
      pack_queries<Math, H>(p.q, task.b, task.m, p.head_dim, box, query, count, vectors, sign,
                            buf.q);
      bool first = true;
      const auto flush = [&] {
        chunk.seal();
        with_vectors(vectors, [&](auto v) {
          attend_keys<Arithmetic, H, decltype(v)::value>(p, buf.q, buf.s, buf.o, buf.top, buf.sum,
                                                         chunk, steps, c, first);
        });
        first = false;
        chunk.clear();
      };
      stream_regions(p, task.b, task.m, r, buf.packed, chunk, all, flush);
      if (first) {
        for (int64_t i = 0; i < p.head_dim_v * vectors * kWidth; i += kWidth) {
          store(buf.o + i, VecF{});
        }
        for (int i = 0; i < vectors * kWidth; i += kWidth) store(buf.sum + i, VecF{});
      }
      write_queries(task, buf, box, query, count, vectors);
    }
  }
}
