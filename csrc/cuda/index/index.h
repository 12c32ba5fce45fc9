// Lists of blocks made and turned on a GPU: static sizes, no wait for the device, two runs make the
// same bits. Every function returns why nothing was launched, or null.
#pragma once
#include <cstdint>

#include "../../common/params.h"
#include "../attention.h"

namespace permattn::cuda {

// A BlockIndex that is written: rows of `heads` = Bx * Hx heads, contiguous.
struct Lists {
  int32_t* indices;      // [heads, capacity]
  int32_t* row_offsets;  // [heads, rows + 1]
  int32_t* num_full;     // [heads, rows]
  int64_t capacity;
};

// core.block_index.BlockIndex.from_block_mask.
struct CompactParams {
  int64_t heads, rows, columns;
  const uint8_t* mask;  // [heads, rows, columns], contiguous
  bool all_full;        // listed blocks are full ones
  Lists lists;          // entries past `capacity` are left out; unused ones become 0
};
const char* launch_compact(const CompactParams& params, void* stream);

// core.block_index.BlockIndex.transpose, of an index that names no key block twice in a row and at
// least one query block.
struct TransposeParams {
  int64_t heads, rows, columns;  // query blocks and key blocks
  const int32_t* indices;        // [heads, capacity]; the capacity is that of `lists`
  const int32_t* row_offsets;    // [heads, rows + 1]
  const int32_t* num_full;       // [heads, rows]
  uint32_t* scratch;             // transpose_scratch() words
  Lists lists;                   // rows are key blocks
};
// Words: a bit for every pair of blocks, twice.
int64_t transpose_scratch(const TransposeParams& params);
const char* launch_transpose(const TransposeParams& params, void* stream);

// AttentionArgs::order: items by the keys that the lists of their tiles hold, the longest first,
// equals in order of number. Reads batch, q_heads, tiles and parts of the args.
int64_t order_scratch(const AttentionArgs& args);  // words
const char* launch_order(const AttentionArgs& args, int32_t* order, uint32_t* scratch,
                         void* stream);

// core.selection.pooled_blocks: means of rows by block of slots, of the tokens there are.
struct PoolParams {
  Dtype dtype;
  int64_t batch, heads, tokens;
  int32_t dim;
  TensorView x;           // [B, H, S, D]
  IntView token_of_slot;  // [Bx, Hx, slots]; data == nullptr: slots are tokens
  int64_t slots, block;
  float* means;  // [B, H, ceil(slots / block), D]
};
const char* launch_pool(const PoolParams& params, void* stream);

// scale * q . k of pooled blocks, in float32.
struct ScoreParams {
  int64_t batch, q_heads, k_heads, rows, columns;
  int32_t dim;
  float scale;
  const float* q;  // [B, Hq, rows, D]
  const float* k;  // [B, Hkv, columns, D]
  float* scores;   // [B, Hq, rows, columns]
};
const char* launch_scores(const ScoreParams& params, void* stream);

// core.selection.strongest_of without a coverage: the `count` largest scores of every row, of equal
// ones the lower column. -inf and NaN are never chosen.
struct StrongestParams {
  int64_t heads, rows, columns;  // heads: B * Hq
  const float* scores;           // [heads, rows, columns]
  const int32_t* stop;    // [heads or 1, rows]: columns [0, stop) may be chosen; or null: all
  int64_t stop_stride;    // 0 or rows
  const int32_t* budget;  // [q_heads]: at most that many of a row; or null: count
  int64_t q_heads;
  int32_t count;
  int32_t* chosen;  // [heads, rows, count], ascending, -1 past the last
};
const char* launch_strongest(const StrongestParams& params, void* stream);

// core.probe.ProbeMass over up to so many rows, in bfloat16 or float16: lse (where it is not
// given), column, square and diagonal, divided by `all_rows` where several launches add up.
constexpr int32_t kMostProbeRows = 64;
int64_t probe_scratch(const ProbeParams& params);  // floats
const char* launch_probe(const ProbeParams& params, int64_t all_rows, float* scratch, void* stream);

}  // namespace permattn::cuda
