// One kernel: what it multiplies, its tiles, and how its shared memory is laid out.
#pragma once
#include "../device/lane_stager.cuh"
#include "../primitives/swizzle.cuh"
#include "../tensor_map.h"
#include "shape.h"

namespace permattn::sm90 {

using cuda::AttentionArgs;
using cuda::PartArgs;
using device::PartHead;

// Bulk copies of one part. Where there is no map, rows are gathered.
struct PartMaps {
  cuda::TensorMap k;  // [B, heads, rows, columns]
  cuda::TensorMap v;  // likewise; [groups of all heads, Dv, 64] where P V is quantised
  int32_t box_rows;   // of k and v: consecutive slots of one entry; 0: no maps of rows
  bool has_k, has_v;
  // 0 where all of them read the same one.
  bool k_moves_b, k_moves_h, v_moves_b, v_moves_h;
};

// The one parameter of a kernel.
struct LaunchArgs {
  AttentionArgs attention;
  int32_t num_items;  // tiles of 128 queries, or pairs of tiles of 64 that may have other lists
  PartMaps maps[cuda::kMaxParts];
};

// What shared memory holds of the lanes of one tile of keys.
template <int kBlockN>
struct KeyTile {
  // -1: no query of the half sees the lane.
  int32_t token[kHalves][kBlockN];
  int32_t slot[kBlockN];                 // -1: no entry
  float scale[kBlockN];                  // of K, by group of slots
  uint32_t seen[kHalves][kBlockN / 32];  // bit by lane
  uint32_t hidden[kBlockN / 32];         // lanes of tokens that no half sees
  int32_t part;
  int32_t group;    // of the first slot; -1: there is none
  bool is_partial;  // the part's band counts
  bool is_last;     // of the item

  PERMATTN_DEVICE bool is_seen(int half) const {
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kBlockN / 32; ++i) any |= seen[half][i];
    return any != 0;
  }
  PERMATTN_DEVICE bool has_holes(int half) const {
    uint32_t all = ~0U;
#pragma unroll
    for (int i = 0; i < kBlockN / 32; ++i) all &= seen[half][i];
    return all != ~0U;
  }
  PERMATTN_DEVICE bool has_hidden() const {
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kBlockN / 32; ++i) any |= hidden[i];
    return any != 0;
  }
};

// Entries of one list of a half: of a part, full or partial.
struct EntryList {
  const int32_t* entries;
  int32_t count;
};

// Where a part of an item lies in memory, and in its maps.
struct PartPlace {
  const char* k;  // token or slot 0
  const char* v;  // likewise; or group 0
  const float* k_scale;
  const float* v_scale;  // of group 0
  const int32_t* kv_token;
  int32_t num_blocks;
  int32_t k_map_h, k_map_b, v_map_h, v_map_b;
  int32_t v_map_group;  // of group 0
};

// kDtype: of q, k, v and out; kFloat32 where only `out` has it, which is then looked up.
template <Dtype kDtype_, Format kQk_, Format kPv_, int kDim_, int kBlockN_>
struct Traits {
  static constexpr Dtype kDtype = kDtype_;
  static constexpr Format kQk = kQk_, kPv = kPv_;
  static constexpr int kDim = kDim_, kBlockN = kBlockN_;
  static constexpr TileShape kShape = tile_shape(kQk, kPv, kDim, kBlockN);
  static constexpr int kStages = kShape.stages;
  static constexpr bool kQInRegisters = kShape.q_in_registers;
  static constexpr bool kQuantisedQk = kQk != Format::kNone;
  static constexpr bool kQuantisedPv = kPv != Format::kNone;
  static_assert(kStages >= 2 && kShape.block_n == kBlockN);
  static_assert(kShape.feed_registers + 2 * kShape.math_registers <= 504);

  static constexpr int kQkBytes = kDim * (kQuantisedQk ? 1 : 2);
  static constexpr int kQkSteps = kQkBytes / 32;
  static constexpr int kPvSteps = kBlockN * (kQuantisedPv ? 1 : 2) / 32;
  using QLayout = ptx::PanelLayout<kHalfRows, kQkBytes>;
  using KLayout = ptx::PanelLayout<kBlockN, kQkBytes>;
  // Small values lie with keys innermost, as their instructions want it.
  using VLayout =
      ptx::PanelLayout<kQuantisedPv ? kDim : kBlockN, kQuantisedPv ? kBlockN : 2 * kDim>;

  // Columns of ones behind those of V: their sums are those of P, as it was rounded. Of other
  // formats each thread adds up its own share.
  static constexpr int kOnesRows = kPv == Format::kFp8 ? 8 : 0;
  static constexpr bool kSharesTotal = kPv != Format::kFp8;
  static constexpr int kScores = kBlockN / 2;                      // of a thread
  static constexpr int kColumns = kDim / 2;                        // likewise
  static constexpr int kProducts = kColumns + kOnesRows / 2;       // likewise
  static constexpr int kWords = kBlockN / (kQuantisedPv ? 8 : 4);  // of P, likewise

  static constexpr int kKBytes = KLayout::kBytes;
  static constexpr int kVScaleOffset = VLayout::kBytes + kOnesRows * VLayout::kRowBytes;
  static constexpr int kVBytes = kVScaleOffset + (kQuantisedPv ? 4 * kDim : 0);
  static constexpr int kQOffset = 0;
  static constexpr int kKOffset = kHalves * QLayout::kBytes;
  static constexpr int kVOffset = kKOffset + kStages * kKBytes;
  static constexpr int kVStride = (kVBytes + 1023) / 1024 * 1024;
  static constexpr int kBooksOffset = kVOffset + kStages * kVStride;
  static_assert(QLayout::kBytes % 1024 == 0 && kKBytes % 1024 == 0);

  // Tile i of the keys has the lanes i % kRing: they are written once the values of tile
  // i - kRing were read.
  static constexpr int kRing = kStages + 1;

  // Places of barriers among all of them.
  static constexpr int kFullQ = 0, kEmptyQ = 1;
  static constexpr int kFullK = 2, kFullV = kFullK + kStages;
  static constexpr int kEmptyK = kFullV + kStages, kEmptyV = kEmptyK + kStages;

  struct Books {
    uint64_t barriers[kEmptyV + kStages];
    EntryList lists[kHalves][2 * cuda::kMaxParts];
    PartPlace parts[cuda::kMaxParts];
    device::QueryTile halves[kHalves];
    device::TokenSpan spans[kHalves], warp_spans[2 * kHalves];
    alignas(16) int32_t q_tokens[kHalves * kHalfRows];
    bool has_keys;  // some list of the item has entries
    alignas(16) KeyTile<kBlockN> tiles[kRing];
  };
  static constexpr int kSharedBytes = kBooksOffset + int(sizeof(Books));
  static_assert(kSharedBytes <= 227 * 1024);
};

// Place in a ring, and the parity of its barriers there.
template <int kCount>
struct Turn {
  int32_t stage = 0;
  uint32_t parity = 0;

  PERMATTN_DEVICE void advance() {
    ++stage;
    if (stage == kCount) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The tile of one half in item i of the work, in the order of `order`, or of the tiles of a head
// from the last to the first.
PERMATTN_DEVICE device::QueryTile half_tile(const LaunchArgs& launch, int32_t i, int32_t half) {
  const AttentionArgs& args = launch.attention;
  const int32_t of_head = items_per_head(args);
  int32_t head = i / of_head;
  int32_t item = of_head - 1 - (i - head * of_head);
  if (args.order != nullptr) {
    const int32_t named = args.order[i];
    head = named / of_head;
    item = named - head * of_head;
  }
  const bool is_pair = args.tiles_per_item == 2;
  const int32_t tile = is_pair ? 2 * item + half : item;
  const int32_t unit = tile / args.tiles_per_unit;
  const int32_t inside =
      (tile - unit * args.tiles_per_unit) * (is_pair ? 1 : 2) + (is_pair ? 0 : half);
  const int32_t first = unit * args.unit + inside * kHalfRows;
  int32_t rows = tile < args.num_tiles ? args.unit - inside * kHalfRows : 0;
  rows = rows < args.num_q_slots - first ? rows : args.num_q_slots - first;
  rows = rows < kHalfRows ? rows : kHalfRows;
  return {head / args.q_heads, head % args.q_heads, first, rows > 0 ? rows : 0};
}

}  // namespace permattn::sm90
