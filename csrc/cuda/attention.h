// One launch of attention over up to kMaxParts parts that share a query order, in plain structs.
// They are a kernel's parameter as they are; no torch, no CUDA runtime.
#pragma once
#include <cstdint>

#include "../common/host_device.h"
#include "../common/params.h"
#include "../common/quant.h"
#include "../common/token_rule.h"

namespace permattn::cuda {

// Plans with more parts in one query order carry their softmax state from launch to launch.
constexpr int kMaxParts = 4;

// Keys, values and lists of one part.
struct PartArgs {
  TensorView k;     // [B, k_heads, rows, D]: the caller's dtype, or bytes where Q K^T is quantised
  TensorView v;     // [B, v_heads, rows, Dv]; unused where P V is quantised
  int32_t k_heads;  // query head h reads head h / (Hq / k_heads)
  int32_t v_heads;  // likewise
  bool k_in_slots;  // rows of k are slots of kv_token, not tokens
  bool v_in_slots;

  // Of what is quantised: scales by group of kv_rows slots, contiguous.
  const float* k_scale;  // [B, k_heads, groups]
  const void* v_tiles;   // [B, v_heads, groups, Dv, kv_rows bytes or nibbles], fragment order
  const float* v_scale;  // [B, v_heads, groups, Dv]

  IntView kv_token;     // [Bx, Hx, num_slots]; data == nullptr: slots are tokens
  IntView kv_indices;   // [Bx, Hx, capacity]
  IntView row_offsets;  // [Bx, Hx, q blocks + 1]
  IntView num_full;     // [Bx, Hx, q blocks]
  int32_t num_slots;
  int32_t block_q, block_kv;
  LaneRange band;   // of a query token, seen from a key token (lanes_are_queries)
  bool has_band;    // false: every pair of tokens is visible
  bool two_bounds;  // the band is bounded on both sides
};

struct AttentionArgs {
  int32_t batch, q_heads;
  int32_t num_q_tokens, num_kv_tokens;
  int32_t head_dim, head_dim_v;
  float scale_log2;  // softmax scale times log2(e)

  TensorView q;             // [B, Hq, rows, D]: tokens; slots where Q K^T is quantised
  const float* q_scale;     // [B, Hq, groups of q_rows slots], contiguous; or null
  int32_t q_rows, kv_rows;  // slots that share a scale
  IntView q_token;          // [Bx, Hx, num_q_slots]; data == nullptr: slots are tokens
  int32_t num_q_slots;

  Dtype out_dtype;  // and of v where P V is not quantised; kBFloat16 or kFloat16
  TensorView out;   // [B, Hq, Sq, Dv]
  float* lse;       // [B, Hq, Sq], contiguous, natural log

  // Softmax state in token order where this launch is one of several of a plan; else null.
  float* acc;    // [B, Hq, Sq, Dv], not normalised
  float* high;   // [B, Hq, Sq], base 2, -inf where nothing was seen
  float* total;  // [B, Hq, Sq]

  int32_t unit;            // slots that lie in one block row of every part
  int32_t tiles_per_unit;  // tiles never cross a unit
  int32_t num_tiles;       // of one head
  int32_t tiles_per_item;  // tiles of a head that one block of threads takes together
  // [B * Hq * items_per_head]: (b * Hq + h) * items_per_head + item, longest first; or null: items
  // of a head from the last to the first.
  const int32_t* order;
  int32_t num_parts;
  PartArgs parts[kMaxParts];
};

// Items of work of one head; the last one may lack tiles.
PERMATTN_HD constexpr int32_t items_per_head(const AttentionArgs& args) {
  return (args.num_tiles + args.tiles_per_item - 1) / args.tiles_per_item;
}

}  // namespace permattn::cuda
