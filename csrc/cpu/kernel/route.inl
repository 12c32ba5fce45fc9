// Routing: means of the boxes of a map, and their affinities, in float32 and in one fixed order.

// Cells of a row, or rows of cells, that are summed in one chain; longer sums are sums of these.
constexpr int64_t kChain = 32;

// At most kChain rows of cells of one row of boxes: offsets from the first cell of their layer.
struct CellRows {
  int64_t offset[kChain];
  int64_t count;

  // Rows [first, first + kChain) of the boxes in row h, as far as they go in layer t.
  PERMATTN_METHOD void find(const BoxedMap& map, int64_t t, int64_t h, int64_t first) {
    const int64_t tall = map.width(1, h), rows = map.width(0, t) * tall;
    count = rows - first < kChain ? rows - first : kChain;
    int64_t z = first / tall, y = first % tall;
    for (int64_t r = 0; r < count; ++r) {
      offset[r] = z * map.stride[0] + (h * map.box[1] + y) * map.stride[1];
      if (++y < tall) continue;
      y = 0;
      ++z;
    }
  }
};

template <class Type>
PERMATTN_INLINE const typename Type::Storage* layer_of(const BoxedMap& map, int64_t b, int64_t t) {
  return static_cast<const typename Type::Storage*>(map.data) + b * map.stride_b +
         t * map.box[0] * map.stride[0];
}

// Channels that lie side by side go into lanes as they are.
template <class Type>
struct ChannelsLast {
  using Storage = typename Type::Storage;
  const BoxedMap& map;
  int64_t channel_stride;

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

  // Adds rows of cells to the sums of the boxes that they run through.
  PERMATTN_METHOD void add_rows(const Storage* data, const CellRows& rows, float* sum) const {
    for (int64_t r = 0; r < rows.count; ++r) {
      const Storage* row = data + rows.offset[r];
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
};

// Boxes of one row: sums over `rows` rows of cells become means.
PERMATTN_INLINE void divide_sums(const BoxedMap& map, int64_t rows, int64_t channels,
                                 int64_t channel_stride, float* sum) {
  for (int64_t j = 0; j < map.counts[2]; ++j, sum += channel_stride) {
    const VecF cells = splat(static_cast<float>(rows * map.width(2, j)));
    for (int64_t c = 0; c < channels; c += kWidth) {
      store_unaligned(sum + c, load_unaligned(sum + c) / cells);
    }
  }
}

// One row of boxes, all channels; memory is read from end to end.
template <class Type>
void route_means_by_row(const MeansTile& tile, std::byte* scratch) {
  const BoxedMap& map = *tile.map;
  const int64_t t = tile.index / map.counts[1], h = tile.index % map.counts[1];
  const int64_t rows = map.width(0, t) * map.width(1, h);
  const auto* data = layer_of<Type>(map, tile.b, t);
  const ChannelsLast<Type> reader{map, tile.channel_stride};
  const int64_t floats = map.counts[2] * tile.channel_stride;
  float* means = tile.means + tile.index * floats;
  CellRows cells;
  for (int64_t first = 0; first < rows; first += kChain) {
    float* sum = first == 0 ? means : reinterpret_cast<float*>(scratch);
    __builtin_memset(sum, 0, static_cast<size_t>(floats) * sizeof(float));
    cells.find(map, t, h, first);
    reader.add_rows(data, cells, sum);
    if (first == 0) continue;
    for (int64_t i = 0; i < floats; i += kWidth) {
      store_unaligned(means + i, load_unaligned(means + i) + load(sum + i));
    }
  }
  divide_sums(map, rows, tile.channel_stride, tile.channel_stride, means);
}

// Strips (rows of cells that make one CellRows) of a channel that are read in one go: as many as
// leave the first cache room for kWidth channels of them.
constexpr int64_t kMaxStrips = 16, kMaxStripFloats = 6144;

struct StripBuffers {
  int64_t width;  // W, in whole vectors
  int64_t strips;
  float* columns;  // [strips, kWidth channels, W]
  float* turned;   // [W, kWidth channels]
  std::byte* end;

  StripBuffers(const BoxedMap& map, std::byte* scratch) : width(round_up(map.size[2], kWidth)) {
    strips = kMaxStripFloats / (kWidth * width);
    strips = strips < 1 ? 1 : strips > kMaxStrips ? kMaxStrips : strips;
    Carver carver{scratch};
    columns = carver.floats(strips * kWidth * width);
    turned = carver.floats(kWidth * width);
    end = carver.next;
  }
};

// Where cells of a row lie side by side, or nothing does: rows are summed in lanes of cells, then
// turned, so that the cells of a box are summed in lanes of channels.
template <class Type>
struct ChannelsFirst {
  using Storage = typename Type::Storage;
  const BoxedMap& map;
  const StripBuffers& buf;
  int64_t channel_stride;

  // Columns of one channel, summed over the rows.
  PERMATTN_METHOD void sum_rows(const Storage* channel, const CellRows& rows, float* to) const {
    const int64_t w = map.size[2], stride = map.stride[2];
    // The next strip: columns are read in an order that no hardware foresees.
    const int64_t ahead = map.box[1] * map.stride[1];
    if (stride != 1) {
      for (int64_t x = 0; x < w; ++x) {
        float acc = 0.0F;
        for (int64_t r = 0; r < rows.count; ++r) {
          acc += Type::load_one(channel + rows.offset[r] + x * stride);
        }
        to[x] = acc;
      }
      return;
    }
    int64_t x = 0;
    for (; x + kWidth <= w; x += kWidth) {
      VecF acc{};
      for (int64_t r = 0; r < rows.count; ++r) {
        const Storage* cells = channel + rows.offset[r] + x;
        __builtin_prefetch(cells + ahead);
        acc += Type::load(cells);
      }
      store(to + x, acc);
    }
    if (x == w) return;
    VecF acc{};
    for (int64_t r = 0; r < rows.count; ++r) {
      acc += load_first<Type>(channel + rows.offset[r] + x, w - x);
    }
    store(to + x, acc);
  }

  PERMATTN_METHOD void turn(const float* columns) const {
    for (int64_t x = 0; x < buf.width; x += kWidth) {
      VecF r[kWidth];
      for (int i = 0; i < kWidth; ++i) r[i] = load(columns + i * buf.width + x);
      transpose(r);
      for (int i = 0; i < kWidth; ++i) store(buf.turned + (x + i) * kWidth, r[i]);
    }
  }

  // Adds turned cells to the sums of the boxes of a row.
  PERMATTN_METHOD void add_turned(float* sum, bool is_first) const {
    const float* cell = buf.turned;
    for (int64_t j = 0; j < map.counts[2]; ++j, sum += channel_stride) {
      VecF total = is_first ? VecF{} : load_unaligned(sum);
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

// Some channels of one layer of boxes along T; every channel is read from end to end.
template <class Type>
void route_means_by_channel(const MeansTile& tile, std::byte* scratch) {
  const BoxedMap& map = *tile.map;
  const StripBuffers buf(map, scratch);
  const ChannelsFirst<Type> reader{map, buf, tile.channel_stride};
  const int64_t all = map.heads * map.dim, tiles = (all + kChannelsPerTile - 1) / kChannelsPerTile;
  const int64_t t = tile.index / tiles, first = tile.index % tiles * kChannelsPerTile;
  const int64_t channels = all - first < kChannelsPerTile ? all - first : kChannelsPerTile;
  const auto* data = layer_of<Type>(map, tile.b, t);
  const int64_t row_floats = map.counts[2] * tile.channel_stride;
  float* means = tile.means + t * map.counts[1] * row_floats + first;
  const int64_t per_box = (map.width(0, t) * map.width(1, 0) + kChain - 1) / kChain;
  const int64_t strips = map.counts[1] * per_box;
  CellRows cells[kMaxStrips];
  for (int64_t s = 0; s < strips; s += buf.strips) {
    const int64_t here = strips - s < buf.strips ? strips - s : buf.strips;
    for (int64_t i = 0; i < here; ++i) {
      cells[i].find(map, t, (s + i) / per_box, (s + i) % per_box * kChain);
    }
    for (int64_t c = 0; c < channels; c += kWidth) {
      for (int64_t j = 0; j < kWidth && c + j < channels; ++j) {
        const int64_t m = (first + c + j) / map.dim, d = (first + c + j) % map.dim;
        const auto* channel = data + m * map.stride_m + d * map.stride_d;
        for (int64_t i = 0; i < here; ++i) {
          reader.sum_rows(channel, cells[i], buf.columns + (i * kWidth + j) * buf.width);
        }
      }
      for (int64_t i = 0; i < here; ++i) {
        reader.turn(buf.columns + i * kWidth * buf.width);
        float* sum = means + (s + i) / per_box * row_floats + c;
        reader.add_turned(sum, (s + i) % per_box == 0);
      }
    }
  }
  for (int64_t h = 0; h < map.counts[1]; ++h, means += row_floats) {
    const int64_t rows = map.width(0, t) * map.width(1, h);
    divide_sums(map, rows, channels, tile.channel_stride, means);
  }
}

static size_t route_means_scratch(const BoxedMap& map, int64_t channel_stride) {
  const StripBuffers buffers(map, nullptr);
  const auto strips = static_cast<size_t>(buffers.end - static_cast<std::byte*>(nullptr));
  const size_t sums = map.counts[2] * channel_stride * sizeof(float);
  return strips > sums ? strips : sums;
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
    for (int64_t c = 0; c < tile.channels; c += kWidth) {
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
  kernels.route_means_by_row = route_means_by_row<Type>;
  kernels.route_means_by_channel = route_means_by_channel<Type>;
  kernels.route_means_scratch = route_means_scratch;
  kernels.route_affinity = route_affinity;
  kernels.route_affinity_scratch = route_affinity_scratch;
  kernels.route_pick = route_pick;
}
