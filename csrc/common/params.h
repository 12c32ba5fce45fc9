// What one call is, in plain structs: the only types that cross from the binding to the kernels.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace permattn {

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// [B, H, S, width] in the caller's layout; strides in elements, the last one is 1. Strides of B and
// H may be 0 (an expanded view), so nothing is ever written through a view that was not made here.
struct TensorView {
  void* data;
  int64_t stride_b, stride_h, stride_s;
};

// int32 [Bx, Hx, size]; an axis of size 1 has stride 0 here, so that broadcasting costs nothing.
struct IntView {
  const int32_t* data;
  int64_t stride_b, stride_h, size;

  PERMATTN_HD const int32_t* row(int64_t b, int64_t h) const {
    return data + b * stride_b + h * stride_h;
  }
};

// min_lag <= q_token - kv_token <= max_lag, both inclusive and inside int32 (see `band_of`).
// An empty band has max_lag < min_lag.
struct Band {
  int64_t min_lag, max_lag;
};

struct PermView {
  IntView token_of_slot;  // [Bx, Hx, num_slots]; -1 = hole
  IntView slot_of_token;  // [Bx, Hx, S]; -1 = not in this part
};

struct IndexView {
  IntView indices;      // [Bx, Hx, capacity]
  IntView row_offsets;  // [Bx, Hx, num_rows + 1]
  IntView num_full;     // [Bx, Hx, num_rows]
  int64_t block_row;    // slots per block of the side that owns the rows
  int64_t block_col;    // slots per block of the side that is listed
};

struct PlanPart {
  PermView q_perm, kv_perm;
  IndexView index;       // query block -> key blocks
  IndexView transposed;  // key block -> query blocks; only the backward reads it
  Band band;
  int32_t group;  // parts of one group share q_perm
};

struct Problem {
  Dtype dtype;
  int64_t batch, q_heads, kv_heads, sq, skv;
  int32_t head_dim, head_dim_v;
  float scale;
  const PlanPart* parts;  // [num_parts]
  int32_t num_parts;
};

struct QuantisedOperands;  // quant.h

struct FwdParams {
  Problem problem;
  TensorView q;                        // [B, Hq, Sq, D]
  TensorView k;                        // [B, Hkv, Skv, D]
  TensorView v;                        // [B, Hkv, Skv, Dv]
  TensorView out;                      // [B, Hq, Sq, Dv]
  float* lse;                          // [B, Hq, Sq], contiguous, natural log
  const QuantisedOperands* quantised;  // or null: q, k and v are multiplied as they are
};

struct BwdParams {
  Problem problem;
  TensorView q, k, v;    // as in the forward
  TensorView out, dout;  // [B, Hq, Sq, Dv]
  const float* lse;      // [B, Hq, Sq], contiguous
  const float* dlse;     // [B, Hq, Sq], contiguous; 0 where lse is -inf
  float* dq;             // [B, Hq, Sq, D], contiguous, zeros on entry
  float* dk;             // [B, Hkv, Skv, D], likewise
  float* dv;             // [B, Hkv, Skv, Dv], likewise
};

// R consecutive rows against the keys on an axis of `size` coordinates. Row r of batch row b stands
// at key position first_position[b] + r and sees the keys of key_range[b] that do not lie behind
// it.
struct ProbeParams {
  Dtype dtype;
  int64_t batch, q_heads, kv_heads, rows, skv, size;
  int32_t head_dim;
  bool lse_is_given;
  TensorView q;                     // [B, Hq, R, D], scaled
  TensorView k;                     // [B, Hkv, Skv, D]
  const int32_t* first_position;    // [B]; negative: no probe rows
  const int32_t* first_coordinate;  // [B], of row 0
  const int32_t* key_range;         // [B, 2]: first key, and one past the last
  const int32_t* order;             // [Bx, size]: key position; or null: coordinate = position
  int64_t order_stride_b;
  const uint8_t* skip;  // [B, Hq, size], contiguous: keys that `diagonal` leaves out; or null
  float* lse;           // [B, Hq, R], contiguous, natural log; read where it is given
  float* column;        // [B, Hq, size], contiguous
  float* square;        // likewise
  float* diagonal;      // likewise, by lag; zeros on entry
};

}  // namespace permattn
