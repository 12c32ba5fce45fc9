// One routing: from the means of boxes of a map to the boxes of another that suit them best.
#pragma once
#include <cstdint>

#include "params.h"

namespace permattn {

// A map [B, heads, T, H, W, dim] cut into boxes, in the caller's layout: no stride need be 1.
struct BoxedMap {
  const void* data;
  int64_t heads, dim;
  int64_t stride_b, stride_m, stride_d;
  // By axis: T, H, W.
  int64_t size[3], stride[3], box[3], counts[3];  // counts: boxes, of which the last may hang over

  int64_t regions() const { return counts[0] * counts[1] * counts[2]; }
  int64_t cells() const { return size[0] * size[1] * size[2]; }
  // Cells of the map in the i-th box along an axis.
  int64_t width(int axis, int64_t i) const {
    const int64_t left = size[axis] - i * box[axis];
    return left < box[axis] ? left : box[axis];
  }
};

struct RouteParams {
  Dtype dtype;
  int64_t batch, topk;
  float scale;
  BoxedMap q, k;   // their heads and dim agree
  int32_t* graph;  // [B, Rq, topk], contiguous
  float* values;   // likewise
};

}  // namespace permattn
