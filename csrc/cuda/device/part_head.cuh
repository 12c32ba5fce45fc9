// What one query tile needs to know of a part, worked out once and kept in shared memory.
#pragma once
#include "query_tile.cuh"

namespace permattn::device {

// One head of a part, and the list of the tile's block row: full entries, then partial ones.
struct PartHead {
  const char* k;  // token or slot 0
  const char* v;  // likewise; or group 0 of the tiles in fragment order
  const float* k_scale;
  const float* v_scale;  // of group 0
  const int32_t* kv_token;
  const int32_t* entries;
  int64_t k_row_bytes, v_row_bytes;
  int32_t num_entries[2];  // full, partial
  int32_t num_lanes[2];
  int32_t num_blocks;
};

PERMATTN_DEVICE int32_t clamp(int32_t x, int32_t low, int32_t high) {
  return x < low ? low : x > high ? high : x;
}

// kElementBytes: of k where Q K^T is not quantised, and of v where P V is not.
template <Format kQk, Format kPv>
PERMATTN_DEVICE PartHead part_head(const AttentionArgs& args, const QueryTile& tile, int32_t part) {
  constexpr int64_t kKeyBytes = kQk == Format::kNone ? 2 : 1;
  const PartArgs& from = args.parts[part];
  PartHead head{};
  const int64_t hk = tile.h / (args.q_heads / from.k_heads);
  const int64_t hv = tile.h / (args.q_heads / from.v_heads);
  head.k = static_cast<const char*>(from.k.data) +
           (tile.b * from.k.stride_b + hk * from.k.stride_h) * kKeyBytes;
  head.k_row_bytes = from.k.stride_s * kKeyBytes;

  const int64_t groups =
      (from.num_slots + args.kv_rows - 1) / (args.kv_rows > 0 ? args.kv_rows : 1);
  if constexpr (kQk != Format::kNone) {
    head.k_scale = from.k_scale + (static_cast<int64_t>(tile.b) * from.k_heads + hk) * groups;
  }
  if constexpr (kPv == Format::kNone) {
    head.v = static_cast<const char*>(from.v.data) +
             (tile.b * from.v.stride_b + hv * from.v.stride_h) * 2;
    head.v_row_bytes = from.v.stride_s * 2;
  } else {
    const int64_t first = (static_cast<int64_t>(tile.b) * from.v_heads + hv) * groups;
    head.v_row_bytes = kPv == Format::kInt4 ? args.kv_rows / 2 : args.kv_rows;
    head.v = static_cast<const char*>(from.v_tiles) + first * args.head_dim_v * head.v_row_bytes;
    head.v_scale = from.v_scale + first * args.head_dim_v;
  }

  if (from.kv_token.data != nullptr) head.kv_token = from.kv_token.row(tile.b, tile.h);
  head.num_blocks = (from.num_slots + from.block_kv - 1) / from.block_kv;
  // Sane on any plan, as plans made on the device are not looked at.
  const int32_t row = tile.first_slot / from.block_q;
  const int32_t capacity = static_cast<int32_t>(from.kv_indices.size);
  const int32_t* offsets = from.row_offsets.row(tile.b, tile.h) + row;
  const int32_t begin = clamp(offsets[0], 0, capacity);
  const int32_t end = clamp(offsets[1], begin, capacity);
  head.entries = from.kv_indices.row(tile.b, tile.h) + begin;
  head.num_entries[0] = clamp(from.num_full.row(tile.b, tile.h)[row], 0, end - begin);
  head.num_entries[1] = end - begin - head.num_entries[0];
  for (int list = 0; list < 2; ++list) {
    head.num_lanes[list] = head.num_entries[list] * from.block_kv;
  }
  return head;
}

// Tiles of kBlockN lanes of all lists: lists share no tile.
template <int kBlockN>
PERMATTN_DEVICE int32_t num_key_tiles(const PartHead* heads, int32_t num_parts) {
  int32_t tiles = 0;
  for (int part = 0; part < num_parts; ++part) {
    for (int list = 0; list < 2; ++list) {
      tiles += (heads[part].num_lanes[list] + kBlockN - 1) / kBlockN;
    }
  }
  return tiles;
}

}  // namespace permattn::device
