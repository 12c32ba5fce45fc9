// Number formats of rows and quantised operands, in plain structs. The meaning is core/quant.py's.
#pragma once
#include <cstddef>
#include <cstdint>

#include "params.h"

namespace permattn {

// In the order of core.packing's QK and PV lists, but for kFp8, which only PV has.
enum class Format : int32_t { kNone = 0, kInt8 = 1, kInt4 = 2, kFp8 = 3 };

// Largest magnitude of a number, and of a probability, which is never negative.
PERMATTN_HD constexpr float high_of(Format format) {
  return format == Format::kInt8 ? 127.0F : format == Format::kInt4 ? 7.0F : 448.0F;
}
PERMATTN_HD constexpr float probability_high_of(Format format) {
  return format == Format::kInt8 ? 255.0F : format == Format::kInt4 ? 15.0F : 448.0F;
}

// How prepared rows lie in memory. A group is the rows that share a scale.
enum class Layout : int32_t {
  kRows = 0,          // [slot][column]
  kBiasedRows = 1,    // the same, bytes plus 128: for products of unsigned by signed bytes
  kBfloat16Rows = 2,  // the same, FP8 numbers as bfloat16, which holds them exactly
  kQuads = 3,         // [group][quad of slots][column][4]
  kTiles = 4,         // [group][64 slots][16 columns][column][64]: tiles of 16 rows of 64 bytes
  kNibbleRows = 5,    // as kRows, INT4 two to a byte, the even column in the low half
  // [group][column][rows_per_scale], INT4 two to a byte: columns whose slots lie in the order in
  // which lanes of a warp hold probabilities (see fragment_slot), zeros past the last slot.
  kFragments = 6,
};

// The slot that stands at place `at` of kFragments, counted from the first slot of its group: where
// a lane has the products of keys 2t, 2t + 1, 2t + 8 and 2t + 9, it multiplies them by four places
// in a row. Of 16 slots for bytes, and of 32 for nibbles, whose lanes take eight places in a row.
PERMATTN_HD constexpr int32_t fragment_slot(Format format, int32_t at) {
  if (format == Format::kInt4) return at / 32 * 32 + at % 8 / 2 * 8 + at / 8 % 4 * 2 + at % 2;
  return at / 16 * 16 + at / 4 % 4 * 2 + at % 2 + at / 2 % 2 * 8;
}

// Norm and rotary embedding of rows; null pointers where there is none.
struct Transform {
  enum class Norm : int32_t { kNone = 0, kRms = 1, kLayer = 2 } norm;
  bool across_heads, interleaved;
  const float* weight;  // [D], or [H * D] across heads
  const float* bias;    // likewise
  float eps;
  const float* cos;  // [rope_rows, rope_width]
  const float* sin;
  int64_t rope_start, rope_rows, rope_width;
};

// Rows of x gathered, transformed, smoothed and quantised.
struct PrepareParams {
  Dtype dtype;
  int64_t batch, heads, tokens;
  int64_t out_heads;  // a multiple of `heads`: several orders of one head
  int64_t slots;
  int32_t dim;
  TensorView x;           // [B, H, S, D]
  IntView token_of_slot;  // [Bx, Hx, slots]; null = slots are tokens
  Transform transform;
  const float* mean;      // [B, H, D], or null
  const float* factor;    // [B, H, D], or null
  const float* dot_with;  // [B, H / dot_group, D], or null
  int64_t dot_group;
  float* dots;  // [B, H, S]: dot_with * transformed row, of tokens that have a slot
  Format format;
  Layout layout;
  int64_t rows_per_scale;
  bool per_column;
  int64_t padded_slots;      // rows that are written: zeros past `slots`
  int64_t row_stride;        // numbers from one row (or column group) to the next
  int64_t scale_stride;      // scales from one group to the next where there is one per column
  int64_t head_stride;       // bytes of `rows` from one head to the next
  void* rows;                // [B, out_heads, ...]
  float* scales;             // [B, out_heads, groups] or [B, out_heads, groups, scale_stride]
  const float* token_stats;  // [B, S, 2]: mean and inverse deviation of tokens across heads
};

// Sums and extremes of transformed columns.
struct ColumnParams {
  PrepareParams source;  // x and transform
  const uint8_t* seen;   // [Bx, Hx, S]: tokens that count; or null: all
  int64_t seen_stride_b, seen_stride_h;
  float* sum;      // [B, H, D]
  float* lowest;   // likewise; +inf where nothing counts
  float* highest;  // likewise; -inf
};

// A QuantSpec and a Prologue with the smoothing they ask for.
struct QuantisedCall {
  Format qk, pv;
  int64_t q_rows, kv_rows;  // per scale
  Transform q_transform, k_transform;
  const float* mean;      // [B, Hkv, D], or null
  const float* k_factor;  // [B, Hkv, D], or null
  const float* q_factor;  // [B, Hq, D], or null
};

// One operand in slot order.
struct PreparedRows {
  const std::byte* rows;  // [B, heads, ...]
  const float* scales;    // [B, heads, groups, scale_stride or 1]
  int64_t heads, groups;
  int64_t group_bytes;  // of rows
  int64_t scale_stride;

  // Of the group that begins at slot `group` * rows_per_scale, for one of `of` heads.
  const std::byte* group(int64_t b, int64_t h, int64_t of, int64_t group) const {
    return rows + ((b * heads + h / (of / heads)) * groups + group) * group_bytes;
  }
  const float* scale(int64_t b, int64_t h, int64_t of, int64_t group) const {
    return scales + ((b * heads + h / (of / heads)) * groups + group) * scale_stride;
  }
};

struct QuantisedOperands {
  Format pv;
  int64_t q_rows, kv_rows;      // per scale
  const PreparedRows* queries;  // [num_groups of parts]
  const PreparedRows* keys;     // [num_parts]
  const PreparedRows* values;   // [num_parts]
};

}  // namespace permattn
