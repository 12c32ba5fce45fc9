// How rows are shared out to blocks and threads. Plain numbers, worked out once on the host.
#pragma once
#include "../../common/quant.h"

namespace permattn::cuda {

// Columns of a row that one thread holds: 16 bytes of a 16-bit type.
constexpr int32_t kChunk = 8;
// A thread holds rows 2t, 2t + 1, 2t + 8 and 2t + 9 of 16, which are neighbours in kFragments.
constexpr int32_t kQuad = 4;
// Rows of a block where groups are smaller or there are none.
constexpr int32_t kTileRows = 64;
constexpr int32_t kMaxThreads = 512;

struct PrepareTiling {
  int32_t lanes;           // threads of a row, a power of two from 8 to 32
  int32_t rows_per_group;  // that share a scale; kTileRows where there is none
  int32_t groups;          // of a tile
  int32_t threads;
  int32_t quads_per_thread;   // 1 or 2
  int64_t tiles, num_groups;  // of a head

  PERMATTN_HD constexpr int32_t rows() const { return groups * rows_per_group; }
};

// Threads of a row.
constexpr int32_t lanes_of(const PrepareParams& p) {
  return p.dim <= 64 ? 8 : p.dim <= 128 ? 16 : 32;
}

inline bool is_aligned(const void* p, uint64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Whether every chunk of x is whole and stands at a multiple of 16 bytes.
inline bool has_whole_chunks(const PrepareParams& p) {
  const int64_t per_word = p.dtype == Dtype::kFloat32 ? 4 : 8;
  return p.dim % kChunk == 0 && is_aligned(p.x.data, 16) &&
         (p.batch == 1 || p.x.stride_b % per_word == 0) &&
         (p.heads == 1 || p.x.stride_h % per_word == 0) &&
         (p.tokens == 1 || p.x.stride_s % per_word == 0);
}

PERMATTN_HD constexpr int32_t round_up_to(int32_t x, int32_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// For 1 to kMaxRowsPerScale rows per scale and 1 to 256 columns.
constexpr PrepareTiling tiling_of(const PrepareParams& p) {
  PrepareTiling t{};
  t.lanes = lanes_of(p);
  const bool has_scales = p.format != Format::kNone;
  t.rows_per_group = has_scales ? static_cast<int32_t>(p.rows_per_scale) : kTileRows;
  t.groups = t.rows_per_group < kTileRows ? kTileRows / t.rows_per_group : 1;
  t.num_groups = (p.padded_slots + t.rows_per_group - 1) / t.rows_per_group;
  t.tiles = (t.num_groups + t.groups - 1) / t.groups;
  const int32_t wanted = round_up_to(t.rows(), 16) / kQuad * t.lanes;
  t.quads_per_thread = wanted > kMaxThreads ? 2 : 1;
  t.threads = wanted / t.quads_per_thread;
  return t;
}

// Dynamic shared memory: maxima of groups, which become inverses of scales; rows whose halves
// change places; tiles before they are written. Rows that are made once need the last two in turn.
struct PrepareShared {
  int32_t high_stride;  // numbers of a group: its columns, or 1
  int32_t exchange_offset, staged_offset;
  int32_t column_bytes;  // of a column of a tile of kFragments, with four more against conflicts
  int32_t bytes;
};

constexpr PrepareShared shared_of(const PrepareParams& p, const PrepareTiling& t) {
  PrepareShared s{};
  const int32_t columns = t.lanes * kChunk;
  s.high_stride = p.per_column ? columns : 1;
  const int32_t high = p.format == Format::kNone ? 0 : t.groups * s.high_stride * 4;
  const bool exchanges = p.transform.cos != nullptr && !p.transform.interleaved;
  const int32_t exchange = exchanges ? t.threads * kChunk * 4 : 0;
  s.exchange_offset = s.staged_offset = round_up_to(high, 16);
  if (t.quads_per_thread > 1) s.staged_offset += exchange;
  s.bytes = s.exchange_offset + exchange;
  if (p.layout == Layout::kFragments) {
    s.column_bytes = (p.format == Format::kInt4 ? t.rows_per_group / 2 : t.rows_per_group) + 4;
    const int32_t tile = t.groups * columns * s.column_bytes;
    s.bytes = s.staged_offset + tile > s.bytes ? s.staged_offset + tile : s.bytes;
  }
  return s;
}

// Whether a thread's chunk is whole, and stands where wide loads may begin.
struct WholeLoads {
  bool x, columns, angles;
};

// The one parameter of the kernel.
struct PrepareArgs {
  PrepareParams p;
  PrepareTiling tiling;
  PrepareShared shared;
  float high;  // largest magnitude of the format
  WholeLoads whole;
  bool whole_rows;  // a chunk is one store
};

}  // namespace permattn::cuda
