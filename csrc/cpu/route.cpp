// Routing over threads: rows or channels of boxes, then rows of regions. Nothing depends on the
// threads.
#include <algorithm>
#include <memory>
#include <vector>

#include "dispatch_internal.h"
#include "schedule.h"

namespace permattn::cpu {
namespace {

constexpr int64_t kRegionsPerTile = 64;
// Every kernel reads whole vectors of channels and of regions, and at most this many rows too far.
constexpr int64_t kPad = 16;
// Numbers read, or multiplied and added, in the time of the pair of tokens by which tiles count.
constexpr int64_t kNumbersPerPair = 4, kProductsPerPair = 64;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Heads whose channels follow each other at one stride are one head.
BoxedMap merged(BoxedMap map) {
  if (map.dim == 1) {
    std::swap(map.heads, map.dim);
    map.stride_d = map.stride_m;
  } else if (map.stride_m == map.dim * map.stride_d || map.heads == 1) {
    map.dim *= map.heads;
    map.heads = 1;
  }
  return map;
}

// The bits of a number as an integer that is the smaller the larger the number: -0 beside 0, NaN
// below all. The number of the region decides among equals.
uint64_t sort_key(float x, int64_t region) {
  uint32_t bits;
  x += 0.0F;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t ascending = x != x ? UINT32_MAX : (bits >> 31) != 0 ? ~bits : bits | 1U << 31;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint64_t>(region);
}

// What Kernels::route_pick does, for rows of any length.
void pick_by_sorting(const float* row, int64_t regions, int64_t topk, uint64_t* keys,
                     int32_t* graph, float* values) {
  for (int64_t i = 0; i < regions; ++i) keys[i] = sort_key(row[i], i);
  if (topk < regions) std::nth_element(keys, keys + topk, keys + regions);
  std::sort(keys, keys + topk);
  for (int64_t i = 0; i < topk; ++i) {
    graph[i] = static_cast<int32_t>(keys[i] & UINT32_MAX);
    values[i] = row[graph[i]];
  }
}

struct Means {
  BoxedMap map;
  int64_t channel_stride;
  std::unique_ptr<float[]> data;  // [B, regions, channel_stride]

  Means(const BoxedMap& given, int64_t batch)
      : map(merged(given)), channel_stride(round_up(given.heads * given.dim, kPad)) {
    data.reset(new float[(batch * map.regions() + kPad) * channel_stride]);
  }
  bool channels_last() const { return map.stride_d == 1; }
  // Tiles of a batch row, and what each of them costs.
  int64_t tiles() const {
    const int64_t channels = map.heads * map.dim;
    const int64_t groups = (channels + kChannelsPerTile - 1) / kChannelsPerTile;
    return map.counts[0] * (channels_last() ? map.counts[1] : groups);
  }
  int64_t cost() const { return map.cells() * map.heads * map.dim / tiles() / kNumbersPerPair; }
  float* of(int64_t b) const { return data.get() + b * map.regions() * channel_stride; }
};

void find_means(const Means& q, const Means& k, int64_t batch, const Kernels& kernels,
                const Pool& pool) {
  const int64_t q_tiles = batch * q.tiles();
  std::vector<int64_t> costs(q_tiles + batch * k.tiles(), q.cost());
  std::fill(costs.begin() + q_tiles, costs.end(), k.cost());
  const size_t scratch_bytes = std::max(kernels.route_means_scratch(q.map, q.channel_stride),
                                        kernels.route_means_scratch(k.map, k.channel_stride));
  run_tiles(pool, costs, scratch_bytes, [&](int64_t i, std::byte* scratch) {
    const Means& of = i < q_tiles ? q : k;
    const int64_t tile = i < q_tiles ? i : i - q_tiles, b = tile / of.tiles();
    const auto means =
        of.channels_last() ? kernels.route_means_by_row : kernels.route_means_by_channel;
    means({&of.map, b, tile % of.tiles(), of.channel_stride, of.of(b)}, scratch);
  });
}

}  // namespace

void route(const RouteParams& params, Isa isa, const Pool& pool) {
  if (params.batch == 0) return;
  const Kernels kernels = select_kernels(isa, params.dtype);
  const Means q(params.q, params.batch), k(params.k, params.batch);
  find_means(q, k, params.batch, kernels, pool);

  const int64_t regions = q.map.regions(), kv_regions = k.map.regions();
  const int64_t row_stride = round_up(kv_regions, kPad);
  const int64_t channels = params.q.heads * params.q.dim;
  // Tiles of one size: 49 regions are one tile, and 65 are two of 33.
  const int64_t tiles = (regions + kRegionsPerTile - 1) / kRegionsPerTile;
  const int64_t per_tile = (regions + tiles - 1) / tiles;
  const int64_t counted = std::min(kv_regions, kMostCounted);
  const int64_t cost = kv_regions * (channels + counted) / kProductsPerPair * per_tile;
  const size_t affinity_bytes = per_tile * row_stride * sizeof(float);
  // Three numbers of four bytes, or one of eight.
  const size_t key_bytes = row_stride * 3 * sizeof(int32_t);
  const size_t scratch_bytes =
      affinity_bytes + key_bytes + kernels.route_affinity_scratch(per_tile, q.channel_stride);
  const std::vector<int64_t> costs(params.batch * tiles, cost);
  run_tiles(pool, costs, scratch_bytes, [&](int64_t i, std::byte* scratch) {
    const int64_t b = i / tiles, first = i % tiles * per_tile;
    const int64_t size = std::min(per_tile, regions - first);
    if (size <= 0) return;
    auto* affinity = reinterpret_cast<float*>(scratch);
    std::byte* keys = scratch + affinity_bytes;
    const float* mean_q = q.of(b) + first * q.channel_stride;
    kernels.route_affinity({mean_q, k.of(b), size, kv_regions, channels, q.channel_stride,
                            params.scale, affinity, row_stride},
                           keys + key_bytes);
    for (int64_t x = 0; x < size; ++x) {
      const float* row = affinity + x * row_stride;
      const int64_t to = (b * regions + first + x) * params.topk;
      if (!kernels.route_pick(row, kv_regions, params.topk, reinterpret_cast<int32_t*>(keys),
                              params.graph + to, params.values + to)) {
        pick_by_sorting(row, kv_regions, params.topk, reinterpret_cast<uint64_t*>(keys),
                        params.graph + to, params.values + to);
      }
    }
  });
}

}  // namespace permattn::cpu
