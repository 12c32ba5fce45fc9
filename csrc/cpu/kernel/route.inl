// Routing: means of the boxes of a map, and their affinities, in float32 and in one fixed order.

// Cells of a row, or rows of cells, that are summed in one chain; longer sums are sums of these.
constexpr int64_t kChain = 32;

struct MeansBuffers {
  float* sum;      // [boxes of a row, channels]: where a box has more than kChain rows of cells
  float* columns;  // [kWidth channels, W]
  float* turned;   // [W, kWidth channels]
  int64_t width;   // W, in whole vectors
  std::byte* end;

  MeansBuffers(const BoxedMap& map, int64_t channel_stride, std::byte* scratch)
      : width(round_up(map.size[2], kWidth)) {
    Carver carver{scratch};
    sum = carver.floats(map.counts[2] * channel_stride);
    columns = carver.floats(kWidth * width);
    turned = carver.floats(kWidth * width);
    end = carver.next;
  }
};

static size_t route_means_scratch(const BoxedMap& map, int64_t channel_stride) {
  const MeansBuffers buffers(map, channel_stride, nullptr);
  return static_cast<size_t>(buffers.end - static_cast<std::byte*>(nullptr));
}

// At most kChain rows of cells of one row of boxes.
template <class Type>
struct CellRows {
  using Storage = typename Type::Storage;
  const BoxedMap& map;
  const MeansBuffers& buf;
  int64_t channel_stride;
  const Storage* data;
  int64_t offset[kChain];
  int64_t count;

  // Adds kWidth * Vectors channels of some cells to `sum`.
  template <int Vectors>
  PERMATTN_METHOD void add_cells(const Storage* cell, int64_t cells, float* sum) const {
    const int64_t stride = map.stride[2];
    VecF acc[Vectors] = {};
    for (int64_t i = 0; i < cells; ++i, cell += stride) {
#pragma GCC unroll 4
      for (int y = 0; y < Vectors; ++y) acc[y] += Type::load(cell + y * kWidth);
    }
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) {
      store_unaligned(sum + y * kWidth, load_unaligned(sum + y * kWidth) + acc[y]);
    }
  }

  // The same for the last n < kWidth channels.
  PERMATTN_METHOD void add_rest(const Storage* cell, int64_t cells, int64_t n, float* sum) const {
    VecF acc{};
    for (int64_t i = 0; i < cells; ++i) acc += load_first<Type>(cell + i * map.stride[2], n);
    store_up_to<Float32>(sum, load_first<Float32>(sum, n) + acc, n);
  }

  PERMATTN_METHOD void add_all_channels(const Storage* cell, int64_t cells, float* sum) const {
    for (int64_t m = 0; m < map.heads; ++m, cell += map.stride_m, sum += map.dim) {
      int64_t d = 0;
      for (; d + 4 * kWidth <= map.dim; d += 4 * kWidth) add_cells<4>(cell + d, cells, sum + d);
      for (; d + kWidth <= map.dim; d += kWidth) add_cells<1>(cell + d, cells, sum + d);
      if (d < map.dim) add_rest(cell + d, cells, map.dim - d, sum + d);
    }
  }

  // Channels lie side by side: they go into lanes as they are.
  PERMATTN_METHOD void add_channels_last(float* sum) const {
    for (int64_t r = 0; r < count; ++r) {
      const Storage* row = data + offset[r];
      for (int64_t j = 0; j < map.counts[2]; ++j) {
        const int64_t cells = map.width(2, j);
        const Storage* first = row + j * map.box[2] * map.stride[2];
        for (int64_t x = 0; x < cells; x += kChain) {
          const int64_t n = cells - x < kChain ? cells - x : kChain;
          add_all_channels(first + x * map.stride[2], n, sum + j * channel_stride);
        }
      }
    }
  }

  // Columns of one channel, summed over the rows.
  PERMATTN_METHOD void sum_rows(const Storage* channel, float* to) const {
    const int64_t w = map.size[2], stride = map.stride[2];
    if (stride == 1) {
      int64_t x = 0;
      for (; x + kWidth <= w; x += kWidth) {
        VecF acc{};
        for (int64_t r = 0; r < count; ++r) acc += Type::load(channel + offset[r] + x);
        store(to + x, acc);
      }
      if (x == w) return;
      VecF acc{};
      for (int64_t r = 0; r < count; ++r) acc += load_first<Type>(channel + offset[r] + x, w - x);
      store(to + x, acc);
      return;
    }
    for (int64_t x = 0; x < w; ++x) {
      float acc = 0.0F;
      for (int64_t r = 0; r < count; ++r) acc += Type::load_one(channel + offset[r] + x * stride);
      to[x] = acc;
    }
  }

  // Cells of a row lie side by side, or nothing does: rows are summed in lanes of cells, then
  // turned, so that the cells of a box are summed in lanes of channels.
  PERMATTN_METHOD void add_channels_first(float* sum) const {
    const Storage* head = data;
    int64_t d = 0;
    const int64_t channels = map.heads * map.dim;
    for (int64_t c = 0; c < channels; c += kWidth) {
      for (int64_t i = 0; i < kWidth; ++i) {
        float* to = buf.columns + i * buf.width;
        if (c + i < channels) {
          sum_rows(head + d * map.stride_d, to);
        } else {
          __builtin_memset(to, 0, static_cast<size_t>(buf.width) * sizeof(float));
        }
        if (++d == map.dim) {
          d = 0;
          head += map.stride_m;
        }
      }
      for (int64_t x = 0; x < buf.width; x += kWidth) {
        VecF r[kWidth];
        for (int i = 0; i < kWidth; ++i) r[i] = load(buf.columns + i * buf.width + x);
        transpose(r);
        for (int i = 0; i < kWidth; ++i) store(buf.turned + (x + i) * kWidth, r[i]);
      }
      add_turned(sum + c);
    }
  }

  PERMATTN_METHOD void add_turned(float* sum) const {
    const float* cell = buf.turned;
    for (int64_t j = 0; j < map.counts[2]; ++j, sum += channel_stride) {
      VecF total = load_unaligned(sum);
      for (int64_t left = map.width(2, j); left > 0; left -= kChain) {
        VecF acc{};
        for (int64_t i = 0; i < (left < kChain ? left : kChain); ++i, cell += kWidth) {
          acc += load(cell);
        }
        total += acc;
      }
      store_unaligned(sum, total);
    }
  }
};

template <class Type>
void route_means(const MeansTile& tile, std::byte* scratch) {
  const BoxedMap& map = *tile.map;
  const MeansBuffers buf(map, tile.channel_stride, scratch);
  const int64_t t = tile.row / map.counts[1], h = tile.row % map.counts[1];
  const int64_t tall = map.width(1, h), rows = map.width(0, t) * tall;
  const auto* data = static_cast<const typename Type::Storage*>(map.data) + tile.b * map.stride_b +
                     t * map.box[0] * map.stride[0] + h * map.box[1] * map.stride[1];
  const int64_t floats = map.counts[2] * tile.channel_stride;
  float* means = tile.means + tile.row * floats;
  for (int64_t first = 0; first < rows; first += kChain) {
    float* sum = first == 0 ? means : buf.sum;
    __builtin_memset(sum, 0, static_cast<size_t>(floats) * sizeof(float));
    const int64_t count = rows - first < kChain ? rows - first : kChain;
    CellRows<Type> cells{map, buf, tile.channel_stride, data, {}, count};
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r;
      cells.offset[r] = row / tall * map.stride[0] + row % tall * map.stride[1];
    }
    if (map.stride_d == 1) {
      cells.add_channels_last(sum);
    } else {
      cells.add_channels_first(sum);
    }
    if (first == 0) continue;
    for (int64_t i = 0; i < floats; i += kWidth) {
      store_unaligned(means + i, load_unaligned(means + i) + load_unaligned(sum + i));
    }
  }
  for (int64_t j = 0; j < map.counts[2]; ++j, means += tile.channel_stride) {
    const VecF cells = splat(static_cast<float>(rows * map.width(2, j)));
    for (int64_t c = 0; c < tile.channel_stride; c += kWidth) {
      store_unaligned(means + c, load_unaligned(means + c) / cells);
    }
  }
}

constexpr int64_t kPanelLanes = kMaxPanel * kWidth;

struct AffinityBuffers {
  float* keys;     // [channels, lanes of a panel]
  float* product;  // [rows, lanes of a panel]
  std::byte* end;

  AffinityBuffers(int64_t rows, int64_t channel_stride, std::byte* scratch) {
    Carver carver{scratch};
    keys = carver.floats(channel_stride * kPanelLanes);
    product = carver.floats((rows + kRowSlack) * kPanelLanes);
    end = carver.next;
  }
};

static size_t route_affinity_scratch(int64_t rows, int64_t channel_stride) {
  const AffinityBuffers buffers(rows, channel_stride, nullptr);
  return static_cast<size_t>(buffers.end - static_cast<std::byte*>(nullptr));
}

// Key regions [first, first + Vectors * kWidth) against all rows of the tile.
template <int Vectors>
PERMATTN_INLINE void affinity_panel(const AffinityTile& tile, const AffinityBuffers& buf,
                                    int64_t first) {
  constexpr int64_t kLanes = Vectors * kWidth;
  for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
    for (int64_t c = 0; c < tile.channel_stride; c += kWidth) {
      VecF r[kWidth];
      for (int j = 0; j < kWidth; ++j) {
        const int64_t region = first + lane + j;
        r[j] = region < tile.kv_regions
                   ? load_unaligned(tile.mean_k + region * tile.channel_stride + c)
                   : VecF{};
      }
      transpose(r);
      for (int j = 0; j < kWidth; ++j) store(buf.keys + (c + j) * kLanes + lane, r[j]);
    }
  }
  gemm<FloatMath<Float32>, Vectors>(tile.mean_q, tile.channel_stride, 1, buf.keys, buf.product,
                                    tile.rows, tile.channels, false);
  const VecF scale = splat(tile.scale);
  for (int64_t x = 0; x < tile.rows; ++x) {
    for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
      store(tile.affinity + x * tile.row_stride + first + lane,
            load(buf.product + x * kLanes + lane) * scale);
    }
  }
}

static void route_affinity(const AffinityTile& tile, std::byte* scratch) {
  const AffinityBuffers buf(tile.rows, tile.channel_stride, scratch);
  for (int64_t first = 0; first < tile.kv_regions; first += kPanelLanes) {
    const int64_t left = tile.kv_regions - first;
    if constexpr (kMaxPanel == 4) {
      if (left > 3 * kWidth) {
        affinity_panel<4>(tile, buf, first);
        continue;
      }
      if (left > 2 * kWidth) {
        affinity_panel<3>(tile, buf, first);
        continue;
      }
    }
    if (left > kWidth) {
      affinity_panel<2>(tile, buf, first);
    } else {
      affinity_panel<1>(tile, buf, first);
    }
  }
}

// Integers in the order of the numbers: -0 beside 0, NaN above all, and INT32_MIN below all.
PERMATTN_INLINE VecI order_of(VecF x) {
  const VecI bits = as_int(x + 0.0F);
  const VecI ordered = bits ^ ((bits >> 31) & INT32_MAX);
  const VecI nan = x != x;
  return (ordered & ~nan) | (nan & INT32_MAX);
}

// Regions in ascending order, with their keys in whole vectors: INT32_MIN behind the last one.
struct Candidates {
  int32_t *keys, *region;
  int64_t count;

  VecI load_keys(int64_t i) const { return *reinterpret_cast<const VecI*>(keys + i); }

  PERMATTN_METHOD void pad() const {
    for (int64_t i = count; i % kWidth != 0; ++i) keys[i] = INT32_MIN;
  }

  // How many of a vector of keys come before each of them.
  PERMATTN_METHOD static VecI before_in_vector(const int32_t* keys, VecI mine) {
    VecI before{}, lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    for (int i = 0; i < kWidth; ++i) {
      before -= (keys[i] > mine) | ((keys[i] == mine) & (lane > i));
    }
    return before;
  }

  // Leaves out what cannot be among the `topk` <= kWidth largest. Of the maxima of the lanes,
  // `topk` reach the bound: so many keys do.
  PERMATTN_METHOD void drop_small(int64_t topk) {
    VecI most = load_keys(0);
    for (int64_t i = kWidth; i < count; i += kWidth) {
      const VecI greater = load_keys(i) > most;
      most = (load_keys(i) & greater) | (most & ~greater);
    }
    alignas(64) int32_t maxima[kWidth], place[kWidth];
    *reinterpret_cast<VecI*>(maxima) = most;
    *reinterpret_cast<VecI*>(place) = before_in_vector(maxima, most);
    int32_t bound = INT32_MIN;
    for (int i = 0; i < kWidth; ++i) bound = place[i] == topk - 1 ? maxima[i] : bound;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t key = keys[i];
      keys[kept] = key;
      region[kept] = region[i];
      kept += key >= bound ? 1 : 0;
    }
    count = kept;
    pad();
  }

  // Writes the numbers of the candidates in descending order: each goes to the place that is the
  // number of those before it. `order` holds whole vectors.
  PERMATTN_METHOD void sort(int32_t* order) const {
    for (int64_t first = 0; first < count; first += kWidth) {
      const VecI mine = load_keys(first);
      VecI before = before_in_vector(keys + first, mine);
      for (int64_t i = 0; i < first; ++i) before -= keys[i] >= mine;
      for (int64_t i = first + kWidth; i < count; ++i) before -= keys[i] > mine;
      alignas(64) int32_t place[kWidth];
      *reinterpret_cast<VecI*>(place) = before;
      const int64_t n = count - first < kWidth ? count - first : kWidth;
      for (int64_t j = 0; j < n; ++j) order[place[j]] = static_cast<int32_t>(first + j);
    }
  }
};

// Writes the `topk` largest of `row`, which is in whole vectors; false, and nothing, where more
// than kMostCounted regions may be among them. `scratch` holds three rows.
static bool route_pick(const float* row, int64_t regions, int64_t topk, int32_t* scratch,
                       int32_t* graph, float* values) {
  const int64_t padded = round_up(regions, kWidth);
  Candidates found{scratch, scratch + padded, regions};
  int32_t* order = scratch + 2 * padded;
  for (int64_t i = 0; i < regions; i += kWidth) {
    *reinterpret_cast<VecI*>(found.keys + i) = order_of(load(row + i));
  }
  found.pad();
  for (int64_t i = 0; i < regions; ++i) found.region[i] = static_cast<int32_t>(i);
  if (topk <= kWidth) found.drop_small(topk);
  if (found.count > kMostCounted) return false;
  found.sort(order);
  for (int64_t s = 0; s < topk; ++s) {
    graph[s] = found.region[order[s]];
    values[s] = row[graph[s]];
  }
  return true;
}

template <class Type>
void add_route_kernels(Kernels& kernels) {
  kernels.route_means = route_means<Type>;
  kernels.route_means_scratch = route_means_scratch;
  kernels.route_affinity = route_affinity;
  kernels.route_affinity_scratch = route_affinity_scratch;
  kernels.route_pick = route_pick;
}
