// The query side of one tile: its slots and its tokens.
#pragma once
#include "../attention.h"
#include "../primitives/platform.cuh"

namespace permattn::device {

using cuda::AttentionArgs;
using cuda::PartArgs;

// What a block works on. Tiles never cross a unit, so one list of every part serves a tile.
struct QueryTile {
  int32_t b, h;
  int32_t first_slot;
  int32_t num_rows;  // slots of the unit that fall in the tile; rows past them idle
};

// Longest rows first, or the tiles of a head backwards: under causality the last ones are longest.
template <int kBlockM>
PERMATTN_DEVICE QueryTile query_tile(const AttentionArgs& args, int32_t block) {
  int32_t head = block / args.num_tiles;
  int32_t tile = args.num_tiles - 1 - (block - head * args.num_tiles);
  if (args.order != nullptr) {
    const int32_t item = args.order[block];
    head = item / args.num_tiles;
    tile = item - head * args.num_tiles;
  }
  const int32_t unit = tile / args.tiles_per_unit;
  const int32_t inside = (tile - unit * args.tiles_per_unit) * kBlockM;
  const int32_t first = unit * args.unit + inside;
  int32_t rows = args.unit - inside;
  rows = rows < args.num_q_slots - first ? rows : args.num_q_slots - first;
  rows = rows < kBlockM ? rows : kBlockM;
  return {head / args.q_heads, head % args.q_heads, first, rows};
}

// Token of a row of the tile; -1: none.
PERMATTN_DEVICE int32_t query_token(const AttentionArgs& args, const QueryTile& tile, int32_t row) {
  if (row >= tile.num_rows) return -1;
  const int32_t slot = tile.first_slot + row;
  const int32_t token =
      args.q_token.data == nullptr ? slot : args.q_token.row(tile.b, tile.h)[slot];
  return static_cast<uint32_t>(token) < static_cast<uint32_t>(args.num_q_tokens) ? token : -1;
}

// Tokens of a tile's rows in shared memory, [kBlockM]. A barrier must follow.
template <int kBlockM, int kThreads>
PERMATTN_DEVICE void stage_query_tokens(const AttentionArgs& args, const QueryTile& tile,
                                        int32_t thread, int32_t* tokens) {
#pragma unroll
  for (int row = 0; row < kBlockM; row += kThreads) {
    if (row + thread < kBlockM) tokens[row + thread] = query_token(args, tile, row + thread);
  }
}

// Lowest and highest token of a tile; low > high where it has none.
struct TokenSpan {
  int32_t low, high;
};

template <int kBlockM>
PERMATTN_DEVICE TokenSpan token_span(const int32_t* tokens) {
  uint32_t low = 0x7FFFFFFF;  // -1 is no lowest one
  int32_t high = -1;
#pragma unroll 8
  for (int row = 0; row < kBlockM; ++row) {
    const auto token = static_cast<uint32_t>(tokens[row]);
    low = token < low ? token : low;
    high = tokens[row] > high ? tokens[row] : high;
  }
  return {static_cast<int32_t>(low), high};
}

}  // namespace permattn::device
