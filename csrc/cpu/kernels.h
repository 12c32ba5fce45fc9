// What an instruction set implements: one tile of queries (or keys) against all it sees.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/params.h"
#include "../common/quant.h"
#include "../common/route.h"

namespace permattn::cpu {

// Queries (or keys) of one tile. Two words of 64 bits hold "which lanes see this token".
constexpr int64_t kTileLanes = 128;
constexpr int64_t kMaxHeadDim = 256;

// The partial result of one group of parts, in slot order: normalised rows and log2-sum-exp2.
// `rows` is null where a group writes the final result.
struct Partial {
  float* rows;      // [B, Hq, num_slots, Dv]
  float* log2_sum;  // [B, Hq, num_slots]; -inf = saw nothing
  PermView q_perm;  // to find a token's slot
  int64_t num_slots;
};

// One group: the parts that share an order of queries, and so one running softmax.
struct Group {
  const int32_t* parts;  // [num_parts], into Problem::parts
  int32_t num_parts;
  PermView q_perm;
  Partial partial;
};

struct FwdTile {
  const FwdParams* params;
  const Group* group;
  const Partial* others;  // [num_others]: partial results to merge before rows are written
  int32_t num_others;
  int64_t b, h;
  int64_t slot;  // first slot
  int64_t size;  // slots, at most kTileLanes
};

// A backward tile: dQ of its queries, or dK and dV of its keys. The side it owns lies in vector
// lanes and the other side is streamed; the arithmetic is the same.
struct BwdTile {
  const BwdParams* params;
  const float* delta;    // [B, Hq, Sq]: rowsum(out * dout) - dlse
  const int32_t* parts;  // [num_parts], into Problem::parts; they share the order of the lanes
  int32_t num_parts;
  bool lanes_are_keys;
  int64_t b, h;  // h is a query head
  int64_t slot, size;
};

// Coordinates of one probe tile: a multiple of every chunk of streamed keys, and more than rows.
constexpr int64_t kProbeTile = 2304;

struct ProbeTile {
  const ProbeParams* params;
  int64_t b, kv_head;
  int64_t first, size;    // coordinates
  float *top, *sum;       // first sweep: [group, R], row sums of 2^(s - top)
  const float* log2_sum;  // second sweep: [B, Hq, R]; +inf = sees nothing
  float* edge;  // second sweep: [group, R - 1], the lowest lags, shared with the next tile
};

// Slots of one head of the result; whole groups where there are scales.
struct PrepareTile {
  const PrepareParams* params;
  int64_t b, h;  // h is one of out_heads
  int64_t slot, size;
};

// Tokens of one head of x; `sum`, `lowest` and `highest` are its own, [D] each.
struct ColumnTile {
  const ColumnParams* params;
  int64_t b, h;
  int64_t token, size;
  float *sum, *lowest, *highest;
};

// Tokens of one batch row.
struct TokenTile {
  const PrepareParams* params;
  int64_t b;
  int64_t token, size;
  float* stats;  // [B, S, 2]
};

// Channels of a map, all heads side by side, that are summed together where they lie apart.
constexpr int64_t kChannelsPerTile = 32;

// Means of one batch row of a map: one row of boxes (index = t * boxes along H + h), or some
// channels of one layer of boxes along T (index = t * tiles of channels + tile).
struct MeansTile {
  const BoxedMap* map;
  int64_t b, index;
  int64_t channel_stride;
  float* means;  // [regions, channel_stride] of the batch row
};

// Most regions whose largest are found by counting: the cost is the square of their number.
constexpr int64_t kMostCounted = 512;

// Some query regions against all key regions of a batch row.
struct AffinityTile {
  const float* mean_q;  // [rows, channel_stride], readable for 16 rows more
  const float* mean_k;  // [kv_regions, channel_stride]
  int64_t rows, kv_regions, channels, channel_stride;
  float scale;
  float* affinity;  // [rows, row_stride], in whole vectors
  int64_t row_stride;
};

// What multiplies V: integers, or floats that stand for numbers of the input's dtype or of FP8.
enum class ValueKind : int32_t { kInteger = 0, kPlain = 1, kFp8 = 2 };
constexpr int32_t kNumValueKinds = 3;

using FwdTileFn = void (*)(const FwdTile& tile, std::byte* scratch);
using BwdTileFn = void (*)(const BwdTile& tile, std::byte* scratch);
using ProbeTileFn = void (*)(const ProbeTile& tile, std::byte* scratch);
using SizeFn = size_t (*)(const Problem& problem);

struct Kernels {
  FwdTileFn forward;
  // Writes the rows of tokens [slot, slot + size) that the tile's group does not hold.
  void (*forward_rest)(const FwdTile& tile);
  SizeFn forward_scratch;  // bytes per thread
  BwdTileFn backward;
  // delta of queries [slot, slot + size).
  void (*backward_delta)(const BwdTile& tile, float* delta);
  SizeFn backward_scratch;
  ProbeTileFn probe_total;
  ProbeTileFn probe_mass;
  size_t (*probe_scratch)(const ProbeParams& params);
  void (*prepare)(const PrepareTile& tile, std::byte* scratch);
  void (*prepare_columns)(const ColumnTile& tile, std::byte* scratch);
  void (*prepare_tokens)(const TokenTile& tile);
  size_t (*prepare_scratch)(const PrepareParams& params);
  void (*route_means_by_row)(const MeansTile& tile, std::byte* scratch);
  void (*route_means_by_channel)(const MeansTile& tile, std::byte* scratch);
  size_t (*route_means_scratch)(const BoxedMap& map, int64_t channel_stride);
  void (*route_affinity)(const AffinityTile& tile, std::byte* scratch);
  size_t (*route_affinity_scratch)(int64_t rows, int64_t channel_stride);
  bool (*route_pick)(const float* row, int64_t regions, int64_t topk, int32_t* scratch,
                     int32_t* graph, float* values);
  // By ValueKind. Each takes V in the layout beside it where it is made of integers.
  FwdTileFn forward_quantised[kNumValueKinds];
  size_t (*quantised_scratch[kNumValueKinds])(const FwdParams& params);
  Layout value_layout;
};

// Null functions where an instruction set has nothing of its own for the dtype.
Kernels portable_kernels(Dtype dtype);
#if defined(__x86_64__)
Kernels avx2_kernels(Dtype dtype);
Kernels avx512_kernels(Dtype dtype);
Kernels avx512_vnni_kernels(Dtype dtype);
Kernels avx512_bf16_kernels(Dtype dtype);
Kernels amx_bf16_kernels(Dtype dtype);
#endif

}  // namespace permattn::cpu
