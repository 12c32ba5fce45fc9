// Rows made ready: gathered by slot, transformed in float32, quantised by groups, laid out for the
// products. The numbers are core.quant.quantise's to the last bit: mind every rounding.

PERMATTN_INLINE float horizontal_sum(VecF x) {
#if PERMATTN_WIDTH == 16
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
  float sum = 0.0F;
  for (int i = 0; i < kWidth; ++i) sum += x[i];
  return sum;
#endif
}

// The larger magnitude, NaN where either is one: magnitudes are ordered like their bits.
PERMATTN_INLINE VecF larger(VecF a, VecF b) { return select(as_int(a) > as_int(b), a, b); }

// Adjacent columns change places.
PERMATTN_INLINE VecF swap_pairs(VecF x) {
#if PERMATTN_WIDTH == 16
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif PERMATTN_WIDTH == 8
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shufflevector(x, x, 1, 0, 3, 2);
#endif
}

// The low (or high) half of x, every number twice.
template <bool High>
PERMATTN_INLINE VecF twice(VecF x) {
#if PERMATTN_WIDTH == 16
  return High ? __builtin_shufflevector(x, x, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14,
                                        15, 15)
              : __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
#elif PERMATTN_WIDTH == 8
  return High ? __builtin_shufflevector(x, x, 4, 4, 5, 5, 6, 6, 7, 7)
              : __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3);
#else
  return High ? __builtin_shufflevector(x, x, 2, 2, 3, 3) : interleave_low(x, x);
#endif
}

// Columns (2i, 2i + 1) turn by angle i.
PERMATTN_INLINE void rotate_pairs(float* row, const float* cos, const float* sin, int64_t width) {
  int64_t i = 0;
  VecF sign;
  for (int j = 0; j < kWidth; ++j) sign[j] = j % 2 == 0 ? -1.0F : 1.0F;
  for (; i + kWidth <= width; i += kWidth) {
    const VecF c = load_unaligned(cos + i), s = load_unaligned(sin + i);
    float* low = row + 2 * i;
    const VecF a = load(low), b = load(low + kWidth);
    store(low, a * twice<false>(c) + swap_pairs(a) * (sign * twice<false>(s)));
    store(low + kWidth, b * twice<true>(c) + swap_pairs(b) * (sign * twice<true>(s)));
  }
  for (; i < width; ++i) {
    const float even = row[2 * i], odd = row[2 * i + 1];
    row[2 * i] = even * cos[i] - odd * sin[i];
    row[2 * i + 1] = even * sin[i] + odd * cos[i];
  }
}

// Columns (i, i + width) turn by angle i.
PERMATTN_INLINE void rotate_halves(float* row, const float* cos, const float* sin, int64_t width) {
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) {
    const VecF c = load_unaligned(cos + i), s = load_unaligned(sin + i);
    const VecF a = load(row + i), b = load_unaligned(row + width + i);
    store(row + i, a * c - b * s);
    store_unaligned(row + width + i, a * s + b * c);
  }
  for (; i < width; ++i) {
    const float first = row[i], second = row[width + i];
    row[i] = first * cos[i] - second * sin[i];
    row[width + i] = first * sin[i] + second * cos[i];
  }
}

// Transformed rows of one (batch, head) as floats, padded with zeros to whole vectors.
template <class Type>
struct RowReader {
  const PrepareParams& p;
  int64_t b, h;  // h is a head of x
  RowsOf<typename Type::Storage> rows;

  RowReader(const PrepareParams& params, int64_t batch_row, int64_t head)
      : p(params), b(batch_row), h(head), rows(params.x, batch_row, head) {}

  void prefetch(int64_t token) const {
    const char* row = reinterpret_cast<const char*>(rows[token]);
    const int64_t bytes = p.dim * static_cast<int64_t>(sizeof(typename Type::Storage));
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
  }

  PERMATTN_METHOD void load_row(int64_t token, float* row) const {
    for (int64_t d = 0; d < p.dim; d += kWidth) {
      store(row + d, load_up_to<Type>(rows[token] + d, p.dim - d));
    }
  }

  // Subtracts the mean and divides by the deviation; the padding stays 0.
  PERMATTN_METHOD void normalise(int64_t token, float* row) const {
    const Transform& t = p.transform;
    float mean = 0.0F, inverse;
    if (t.across_heads) {
      mean = p.token_stats[2 * (b * p.tokens + token)];
      inverse = p.token_stats[2 * (b * p.tokens + token) + 1];
    }
    if (t.norm == Transform::Norm::kLayer) {
      if (!t.across_heads) {
        VecF sum{};
        for (int64_t d = 0; d < p.dim; d += kWidth) sum += load(row + d);
        mean = horizontal_sum(sum) / static_cast<float>(p.dim);
      }
      for (int64_t d = 0; d < p.dim; d += kWidth) store(row + d, load(row + d) - mean);
      for (int64_t d = p.dim; d % kWidth != 0; ++d) row[d] = 0.0F;
    }
    if (!t.across_heads) {
      VecF square{};
      for (int64_t d = 0; d < p.dim; d += kWidth) square += load(row + d) * load(row + d);
      const float mean_square = horizontal_sum(square) / static_cast<float>(p.dim);
      inverse = 1.0F / __builtin_sqrtf(mean_square + t.eps);
    }
    const int64_t first = t.across_heads ? h * p.dim : 0;
    for (int64_t d = 0; d < p.dim; d += kWidth) {
      VecF x = load(row + d) * inverse;
      if (t.weight != nullptr) x *= load_up_to<Float32>(t.weight + first + d, p.dim - d);
      if (t.bias != nullptr) x += load_up_to<Float32>(t.bias + first + d, p.dim - d);
      store(row + d, x);
    }
  }

  PERMATTN_METHOD void read(int64_t token, float* row) const {
    const Transform& t = p.transform;
    load_row(token, row);
    if (t.norm != Transform::Norm::kNone) normalise(token, row);
    const int64_t angle = token - t.rope_start;
    if (t.cos == nullptr || angle < 0 || angle >= t.rope_rows) return;
    const float* cos = t.cos + angle * t.rope_width;
    const float* sin = t.sin + angle * t.rope_width;
    if (t.interleaved) {
      rotate_pairs(row, cos, sin, t.rope_width);
    } else {
      rotate_halves(row, cos, sin, t.rope_width);
    }
  }
};

// Mean and inverse deviation of every token over all heads.
template <class Type>
void prepare_tokens(const TokenTile& tile) {
  const PrepareParams& p = *tile.params;
  const auto count = static_cast<float>(p.heads * p.dim);
  alignas(64) float row[kMaxHeadDim];
  for (int64_t token = tile.token; token < tile.token + tile.size; ++token) {
    float* stats = tile.stats + 2 * (tile.b * p.tokens + token);
    float mean = 0.0F;
    if (p.transform.norm == Transform::Norm::kLayer) {
      VecF sum{};
      for (int64_t h = 0; h < p.heads; ++h) {
        RowReader<Type>(p, tile.b, h).load_row(token, row);
        for (int64_t d = 0; d < p.dim; d += kWidth) sum += load(row + d);
      }
      mean = horizontal_sum(sum) / count;
    }
    VecF square{};
    for (int64_t h = 0; h < p.heads; ++h) {
      RowReader<Type>(p, tile.b, h).load_row(token, row);
      for (int64_t d = 0; d < p.dim; d += kWidth) {
        VecF x = load(row + d) - mean;
        for (int64_t j = p.dim - d; j < kWidth; ++j) x[j] = 0.0F;
        square += x * x;
      }
    }
    stats[0] = mean;
    stats[1] = 1.0F / __builtin_sqrtf(horizontal_sum(square) / count + p.transform.eps);
  }
}

template <class Type>
void prepare_columns(const ColumnTile& tile, std::byte* scratch) {
  const ColumnParams& c = *tile.params;
  const PrepareParams& p = c.source;
  auto* row = reinterpret_cast<float*>(scratch);
  const RowReader<Type> reader(p, tile.b, tile.h);
  const int64_t width = round_up(p.dim, kWidth);
  float *sum = row + width, *lowest = sum + width, *highest = lowest + width;
  for (int64_t d = 0; d < width; d += kWidth) {
    store(sum + d, VecF{});
    store(lowest + d, splat(kInfinity));
    store(highest + d, splat(-kInfinity));
  }
  const uint8_t* seen =
      c.seen == nullptr ? nullptr : c.seen + tile.b * c.seen_stride_b + tile.h * c.seen_stride_h;
  for (int64_t token = tile.token; token < tile.token + tile.size; ++token) {
    if (seen != nullptr && seen[token] == 0) continue;
    reader.read(token, row);
    for (int64_t d = 0; d < p.dim; d += kWidth) {
      const VecF x = load(row + d);
      store(sum + d, load(sum + d) + x);
      // The row second: a NaN stays out of the extremes of others no more than torch's amax lets
      // it.
      store(lowest + d, minimum(load(lowest + d), x));
      store(highest + d, maximum(load(highest + d), x));
    }
  }
  for (int64_t d = 0; d < p.dim; ++d) {
    tile.sum[d] = sum[d];
    tile.lowest[d] = lowest[d];
    tile.highest[d] = highest[d];
  }
}

// The byte of a number that e4m3 holds; `sign_of` carries the sign of a zero.
PERMATTN_INLINE VecI e4m3_bytes(VecF x, VecF sign_of) {
  const VecI bits = as_int(magnitude(x));
  const VecI normal = (bits >> 20) - (120 << 3);
  const VecI subnormal = to_integer(magnitude(x) * 512.0F);
  const VecI small = magnitude(x) < 0x1p-6F;
  const VecI nan = x != x;
  const VecI sign = (as_int(sign_of) >> 24) & 0x80;
  return (((subnormal & small) | (normal & ~small)) & ~nan) | (nan & 0x7f) | sign;
}

PERMATTN_INLINE void store_bytes(void* to, VecI x, int64_t n) {
  typedef uint8_t VecB __attribute__((vector_size(kWidth)));
  const VecB bytes = __builtin_convertvector(reinterpret_cast<VecU>(x) & 255, VecB);
  __builtin_memcpy(to, &bytes, n < kWidth ? static_cast<size_t>(n) : kWidth);
}

struct PrepareBuffers {
  float *rows, *inverse;  // [rows][width]; [width]
  int64_t width, capacity;
  std::byte* end;

  PrepareBuffers(const PrepareParams& p, std::byte* scratch) {
    Carver carver{scratch};
    width = round_up(p.dim, kWidth);
    const int64_t most = p.format == Format::kNone ? 1 : p.rows_per_scale;
    capacity = round_up(most < p.padded_slots ? most : p.padded_slots, 4);
    rows = carver.floats((capacity > 4 ? capacity : 4) * width);
    inverse = carver.floats(width);
    end = carver.next;
  }
};

static size_t prepare_scratch(const PrepareParams& p) {
  const PrepareBuffers buffers(p, nullptr);
  return static_cast<size_t>(buffers.end - static_cast<std::byte*>(nullptr));
}

// One group of slots, [first, first + count), `count` rows of `padded_slots`.
template <class Type>
struct GroupWriter {
  const PrepareParams& p;
  const PrepareTile& tile;
  const PrepareBuffers& buf;
  const RowReader<Type>& reader;
  int64_t first, count;

  // Rows as floats, smoothed; holes and padding are zeros.
  PERMATTN_METHOD void read_rows() const {
    const int64_t place = (tile.b * p.heads + reader.h) * p.dim;
    const int32_t* token_of_slot =
        p.token_of_slot.data == nullptr ? nullptr : p.token_of_slot.row(tile.b, tile.h);
    constexpr int64_t kAhead = 6;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = first + i;
      float* row = buf.rows + i * buf.width;
      if (token_of_slot != nullptr && slot + kAhead < p.slots) {
        const auto next = static_cast<uint32_t>(token_of_slot[slot + kAhead]);
        if (next < static_cast<uint64_t>(p.tokens)) reader.prefetch(next);
      }
      const int64_t token = slot >= p.slots            ? -1
                            : token_of_slot == nullptr ? slot
                                                       : token_of_slot[slot];
      if (token < 0 || token >= p.tokens) {
        for (int64_t d = 0; d < buf.width; d += kWidth) store(row + d, VecF{});
        continue;
      }
      reader.read(token, row);
      if (p.dots != nullptr) add_dot(token, row);
      if (p.mean == nullptr && p.factor == nullptr) continue;
      for (int64_t d = 0; d < p.dim; d += kWidth) {
        VecF x = load(row + d);
        if (p.mean != nullptr) x -= load_up_to<Float32>(p.mean + place + d, p.dim - d);
        if (p.factor != nullptr) x *= load_up_to<Float32>(p.factor + place + d, p.dim - d);
        store(row + d, x);
      }
    }
  }

  PERMATTN_METHOD void add_dot(int64_t token, const float* row) const {
    const float* with =
        p.dot_with + (tile.b * (p.heads / p.dot_group) + reader.h / p.dot_group) * p.dim;
    VecF sum{};
    for (int64_t d = 0; d < p.dim; d += kWidth) {
      sum += load(row + d) * load_up_to<Float32>(with + d, p.dim - d);
    }
    p.dots[(tile.b * p.heads + reader.h) * p.tokens + token] = horizontal_sum(sum);
  }

  // Scales of the group go to memory, their inverses to `inverse`. The reciprocal is rounded before
  // it is multiplied by `high`, as torch does.
  PERMATTN_METHOD void find_scales(int64_t group, int64_t groups) const {
    constexpr float kLeast = 1e-30F;  // core.quant.LEAST_MAXIMUM
    const float high = high_of(p.format);
    const int64_t place = (tile.b * p.out_heads + tile.h) * groups + group;
    for (int64_t d = 0; d < buf.width; d += kWidth) {
      VecF most{};
      for (int64_t i = 0; i < count; ++i) {
        most = larger(most, magnitude(load(buf.rows + i * buf.width + d)));
      }
      store(buf.inverse + d, most);
    }
    if (!p.per_column) {
      VecF most{};
      for (int64_t d = 0; d < buf.width; d += kWidth) most = larger(most, load(buf.inverse + d));
      int32_t bits = 0;
      for (int i = 0; i < kWidth; ++i) bits = as_int(most)[i] > bits ? as_int(most)[i] : bits;
      float all;
      __builtin_memcpy(&all, &bits, 4);
      const bool zero = all < kLeast;
      p.scales[place] = zero ? 0.0F : all / high;
      const float inverse = zero ? 0.0F : 1.0F / all * high;
      for (int64_t d = 0; d < buf.width; d += kWidth) store(buf.inverse + d, splat(inverse));
      return;
    }
    float* scales = p.scales + place * p.scale_stride;
    for (int64_t d = 0; d < buf.width; d += kWidth) {
      const VecF most = load(buf.inverse + d);
      const VecI zero = most < kLeast;
      const VecF scale = select(zero, VecF{}, most / high);
      store(buf.inverse + d, select(zero, VecF{}, (1.0F / most) * high));
      if (d < p.scale_stride) store_up_to<Float32>(scales + d, scale, p.scale_stride - d);
    }
    for (int64_t d = buf.width; d < p.scale_stride; ++d) scales[d] = 0.0F;
  }

  // Clamped before it is rounded: the same number, and no compiler fuses the product with the sum
  // that rounds.
  PERMATTN_METHOD VecF scaled(int64_t i, int64_t d) const {
    const VecF limit = splat(high_of(p.format));
    const VecF x = load(buf.rows + i * buf.width + d) * load(buf.inverse + d);
    return minimum(limit, maximum(-limit, x));
  }

  PERMATTN_METHOD VecI numbers(int64_t i, int64_t d) const {
    return i < count ? to_integer(scaled(i, d)) : VecI{};
  }

  PERMATTN_METHOD void store_rows(std::byte* head) const {
    const int64_t n = p.dim;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (first + i) * p.row_stride;
      if (p.layout == Layout::kBfloat16Rows) {
        auto* to = reinterpret_cast<uint16_t*>(head) + at;
        for (int64_t d = 0; d < n; d += kWidth) {
          store_up_to<BFloat16>(to + d, round_to_e4m3(scaled(i, d)), n - d);
        }
      } else if (p.format == Format::kFp8) {
        for (int64_t d = 0; d < n; d += kWidth) {
          const VecF x = scaled(i, d);
          store_bytes(head + at + d, e4m3_bytes(round_to_e4m3(x), x), n - d);
        }
      } else {
        const int32_t bias = p.layout == Layout::kBiasedRows ? 128 : 0;
        for (int64_t d = 0; d < n; d += kWidth) {
          store_bytes(head + at + d, numbers(i, d) + bias, n - d);
        }
        __builtin_memset(head + at + n, 0, static_cast<size_t>(p.row_stride - n));
      }
    }
  }

  // Four slots of a column in one dword.
  PERMATTN_METHOD VecI quad(int64_t i, int64_t d) const {
    return (numbers(i, d) & 255) | ((numbers(i + 1, d) & 255) << 8) |
           ((numbers(i + 2, d) & 255) << 16) | (numbers(i + 3, d) << 24);
  }

  PERMATTN_METHOD void store_quads(std::byte* group) const {
    for (int64_t i = 0; i < count; i += 4) {
      auto* to = reinterpret_cast<float*>(group) + i / 4 * p.row_stride;
      for (int64_t d = 0; d < buf.width; d += kWidth) {
        store_up_to<Float32>(to + d, as_float(quad(i, d)), p.row_stride - d);
      }
      for (int64_t d = buf.width; d < p.row_stride; ++d) to[d] = 0.0F;
    }
  }

  PERMATTN_METHOD void store_tiles(std::byte* group) const {
    constexpr int64_t kTileRows = 16, kTileSlots = 64;
    auto* to = reinterpret_cast<float*>(group);
    for (int64_t i = 0; i < count; i += kTileSlots) {
      for (int64_t d = 0; d < p.row_stride; d += kTileRows, to += kTileRows * kTileRows) {
        for (int64_t q = 0; q < kTileSlots / 4; ++q) {
          for (int64_t x = 0; x < kTileRows; x += kWidth) {
            const bool there = d + x < buf.width && i + 4 * q < count;
            const VecI numbers = there ? quad(i + 4 * q, d + x) : VecI{};
            for (int j = 0; j < kWidth; ++j) {
              __builtin_memcpy(to + (x + j) * kTileRows + q,
                               reinterpret_cast<const float*>(&numbers) + j, 4);
            }
          }
        }
      }
    }
  }
};

template <class Type>
void prepare_tile(const PrepareTile& tile, std::byte* scratch) {
  const PrepareParams& p = *tile.params;
  const PrepareBuffers buf(p, scratch);
  const RowReader<Type> reader(p, tile.b, tile.h / (p.out_heads / p.heads));
  std::byte* head =
      static_cast<std::byte*>(p.rows) + (tile.b * p.out_heads + tile.h) * p.head_stride;
  if (p.format == Format::kNone) {
    auto* rows = reinterpret_cast<typename Type::Storage*>(head);
    for (int64_t slot = tile.slot; slot < tile.slot + tile.size; ++slot) {
      const GroupWriter<Type> writer{p, tile, buf, reader, slot, 1};
      writer.read_rows();
      for (int64_t d = 0; d < p.dim; d += kWidth) {
        store_up_to<Type>(rows + slot * p.row_stride + d, load(buf.rows + d), p.dim - d);
      }
    }
    return;
  }
  const int64_t per_group = p.rows_per_scale < p.padded_slots ? p.rows_per_scale : p.padded_slots;
  const int64_t groups = (p.padded_slots + per_group - 1) / per_group;
  for (int64_t slot = tile.slot; slot < tile.slot + tile.size; slot += per_group) {
    const int64_t left = tile.slot + tile.size - slot;
    const GroupWriter<Type> writer{p, tile, buf, reader, slot, left < per_group ? left : per_group};
    const int64_t group = slot / per_group;
    writer.read_rows();
    writer.find_scales(group, groups);
    if (p.layout == Layout::kQuads) {
      writer.store_quads(head + group * (p.head_stride / groups));
    } else if (p.layout == Layout::kTiles) {
      writer.store_tiles(head + group * (p.head_stride / groups));
    } else {
      writer.store_rows(head);
    }
  }
}

template <class Type>
void add_prepare_kernels(Kernels& kernels) {
  kernels.prepare = prepare_tile<Type>;
  kernels.prepare_columns = prepare_columns<Type>;
  kernels.prepare_tokens = prepare_tokens<Type>;
  kernels.prepare_scratch = prepare_scratch;
}
