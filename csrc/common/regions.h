// Attention from region to region, in plain structs; see core/regions.py.
#pragma once
#include "params.h"

namespace permattn {

// [B, M, T, H, W, width] in the caller's layout; strides in elements, any of them, the last too.
struct MapView {
  void* data;
  int64_t stride_b, stride_m, stride_t, stride_h, stride_w, stride_d;
};

// A map of (frames, rows, columns) cut into boxes; those at the far edges may hang over.
struct RegionGrid {
  int64_t size[3], box[3], counts[3];

  int64_t num_regions() const { return counts[0] * counts[1] * counts[2]; }
  int64_t num_tokens() const { return size[0] * size[1] * size[2]; }
  int64_t cells() const { return box[0] * box[1] * box[2]; }  // of a box
};

struct RegionParams {
  Dtype dtype;
  int64_t batch, heads;
  int32_t head_dim, head_dim_v;
  float scale;
  bool count_padding;  // cells of key boxes outside the map are keys of zeros, not hidden
  RegionGrid q_grid, kv_grid;
  MapView q, k, v, out;
  float* lse;  // [B, M, T, H, W], contiguous, natural log
  // [Bx, Mx, Rq, topk]; an axis of size 1 has stride 0. A value that names no region is seen by
  // nobody.
  const int32_t* graph;
  int64_t graph_stride_b, graph_stride_m, topk;
  const float* weights;  // as the graph; or null
  int64_t weights_stride_b, weights_stride_m;

  const int32_t* row(int64_t b, int64_t m, int64_t r) const {
    return graph + b * graph_stride_b + m * graph_stride_m + r * topk;
  }
  const float* weights_row(int64_t b, int64_t m, int64_t r) const {
    return weights + b * weights_stride_b + m * weights_stride_m + r * topk;
  }
};

struct RegionBwdParams {
  RegionParams forward;  // with its results
  MapView dout;          // [B, M, T, H, W, Dv]
  const float* dlse;     // [B, M, T, H, W], contiguous
  MapView dq, dk, dv;    // written whole
  float* dweights;       // [B, M, Rq, topk], contiguous, zeros on entry: heads that share a tile
                         // add to the first of them; or null
};

}  // namespace permattn
