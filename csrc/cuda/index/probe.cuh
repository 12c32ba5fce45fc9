// Where rows look, summed along columns and diagonals of the keys: two sweeps, of which nothing of
// the size rows x keys is stored. A block of threads takes one head and one split of the axis; what
// splits share goes through memory and is added in a fixed order.
#pragma once
#include "../../common/params.h"
#include "../device/matrix_address.cuh"
#include "../permute/warp.cuh"
#include "../sm80/products.cuh"
#include "index.h"

namespace permattn::index {

constexpr int kProbeRows = cuda::kMostProbeRows, kProbeKeys = 64;
constexpr int kProbeThreads = 128, kProbeWarps = kProbeThreads / 32;
// Coordinates of a block: enough to hide the start of one, few enough to fill a device at 32k keys.
constexpr int32_t kProbeSplit = 1024;
// Of a row of probabilities: writes of fragments, and reads of columns and diagonals, meet in no
// bank of shared memory.
constexpr int kProbeStride = kProbeKeys + 8;
constexpr int kMergeThreads = 256;

struct ProbeArgs {
  ProbeParams p;
  int32_t splits;
  float mean;   // 1 / rows of all launches
  float* top;   // [B, Hq, splits, kProbeRows], base 2
  float* sum;   // likewise, relative to 2^top
  float* edge;  // [B, Hq, splits, kProbeKeys]: diagonals that go on in the next split
};

// Keys of 64 coordinates.
struct ProbeTile {
  int32_t key[kProbeKeys];            // -1: no row sees it, and it is not read
  uint32_t seen[kProbeKeys / 32];     // bit by coordinate
  uint32_t skipped[kProbeKeys / 32];  // likewise: `diagonal` leaves it out
};

template <Dtype kDtype_, int kDim_>
struct ProbeTraits {
  static constexpr Dtype kDtype = kDtype_;
  static constexpr int kDim = kDim_, kSteps = kDim / 16;
  static constexpr int kKeyTiles = kProbeKeys / 8;
  static constexpr int kBlocks =
      kDim <= 128 ? 3 : 2;  // of a multiprocessor, which bounds registers
  using Layout = ptx::PanelLayout<kProbeKeys, 2 * kDim>;
  using Product = sm80::ScoreProduct<Format::kNone, kDtype>;
  static_assert(kProbeRows == kProbeKeys, "Q passes through a buffer of K");

  struct Books {
    ProbeTile tiles[2];
    float carry[kProbeKeys];
    alignas(16) float p[kProbeRows * kProbeStride];
  };
  static constexpr int kBooksOffset = 2 * Layout::kBytes;
  static constexpr int kSharedBytes = kBooksOffset + static_cast<int>(sizeof(Books));
};

template <class T>
using ProbeScores = float[T::kKeyTiles][4];

// What one block of threads looks at.
struct ProbePlace {
  int32_t h, split, b;
  int64_t head;            // of all batch rows
  int64_t first;           // coordinate of the split
  int64_t begin, end;      // keys that exist
  int64_t position, last;  // keys of row 0 and of the last row; -1: there are no rows

  PERMATTN_DEVICE explicit ProbePlace(const ProbeArgs& args) {
    const ProbeParams& p = args.p;
    const auto heads = static_cast<uint32_t>(p.q_heads),
               splits = static_cast<uint32_t>(args.splits);
    h = static_cast<int32_t>(blockIdx.x % heads);
    split = static_cast<int32_t>(blockIdx.x / heads % splits);
    b = static_cast<int32_t>(blockIdx.x / heads / splits);
    head = b * p.q_heads + h;
    first = static_cast<int64_t>(split) * kProbeSplit;
    begin = p.key_range[2 * b] > 0 ? p.key_range[2 * b] : 0;
    end = p.key_range[2 * b + 1] < p.skv ? p.key_range[2 * b + 1] : p.skv;
    position = p.first_position[b];
    last = position < 0 ? -1 : position + p.rows - 1;
  }
};

// Scores of a split, tile by tile.
template <class T>
class ProbeSweep {
 public:
  PERMATTN_DEVICE ProbeSweep(const ProbeArgs& args, const ProbePlace& place, char* shared)
      : p_(args.p),
        place_(place),
        shared_(shared),
        books_(*reinterpret_cast<typename T::Books*>(shared + T::kBooksOffset)),
        thread_(static_cast<int32_t>(threadIdx.x)),
        lane_(thread_ % 32),
        first_row_(thread_ / 32 * 16) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row_ + lane_ / 4 + 8 * half;
      last_key_[half] = place.last < 0 || row >= p_.rows ? -1 : place.position + row;
    }
  }

  // visit(first coordinate, tile, scores in base 2) of the tiles before `stop`; -inf where a row
  // does not see a key. Threads stand at a barrier before and after.
  template <class Visit>
  PERMATTN_DEVICE void run(int64_t stop, const Visit& visit) {
    if (stop <= place_.first) return;
    load_queries();
    const int64_t count = (stop - place_.first + kProbeKeys - 1) / kProbeKeys;
    fetch(0);
    stage(0);
    ptx::cp_async_commit();
    for (int64_t i = 0; i < count; ++i) {
      if (i + 1 < count) stage(i + 1);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
      __syncthreads();
      const ProbeTile& tile = books_.tiles[i % 2];
      ProbeScores<T> score;
      multiply(tile, buffer(i), score);
      visit(place_.first + i * kProbeKeys, tile, score);
      __syncthreads();
    }
  }

 private:
  const ProbeParams& p_;
  const ProbePlace& place_;
  char* shared_;
  typename T::Books& books_;
  int32_t thread_, lane_, first_row_;
  int64_t last_key_[2];  // that the thread's rows see
  uint32_t q_[T::kSteps][4];
  // Of the coordinate that this thread stages next.
  int32_t key_;
  bool is_skipped_;

  PERMATTN_DEVICE char* buffer(int64_t i) const { return shared_ + i % 2 * T::Layout::kBytes; }

  PERMATTN_DEVICE void load_queries() {
    const char* base = static_cast<const char*>(p_.q.data) +
                       2 * (place_.b * p_.q.stride_b + place_.h * p_.q.stride_h);
    char* to = buffer(1);
    device::copy_rows<typename T::Layout, kProbeThreads>(
        to, thread_, 2 * p_.head_dim, [&](int row) -> device::RowSource {
          const bool is_there = row < p_.rows;
          return {base + (is_there ? row : 0) * 2 * p_.q.stride_s, is_there};
        });
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    const auto address = device::MatrixAddress<typename T::Layout>::of_a(
        static_cast<uint32_t>(T::Layout::kBytes + first_row_ * T::Layout::kPanelBytes), lane_);
#pragma unroll
    for (int step = 0; step < T::kSteps; ++step) {
      ptx::ldmatrix_x4<false>(q_[step], shared_ + address.at(0, step));
    }
    __syncthreads();
  }

  // Asks for what `stage` writes.
  PERMATTN_DEVICE void fetch(int64_t i) {
    key_ = -1;
    is_skipped_ = false;
    const int64_t at = place_.first + i * kProbeKeys + thread_;
    if (thread_ >= kProbeKeys || at >= p_.size) return;
    key_ = p_.order == nullptr ? static_cast<int32_t>(at)
                               : p_.order[place_.b * p_.order_stride_b + at];
    if (p_.skip != nullptr) is_skipped_ = p_.skip[place_.head * p_.size + at] != 0;
  }

  // Writes down the keys of tile i and begins to copy them; asks for those of the next tile.
  PERMATTN_DEVICE void stage(int64_t i) {
    ProbeTile& tile = books_.tiles[i % 2];
    if (thread_ < kProbeKeys) {
      const bool is_seen = key_ >= place_.begin && key_ < place_.end && key_ <= place_.last;
      tile.key[thread_] = is_seen ? key_ : -1;
      const uint32_t seen = ptx::ballot(is_seen), skipped = ptx::ballot(is_skipped_);
      if (lane_ == 0) {
        tile.seen[thread_ / 32] = seen;
        tile.skipped[thread_ / 32] = skipped;
      }
    }
    __syncthreads();
    fetch(i + 1);
    const int64_t h = place_.h / (p_.q_heads / p_.kv_heads);
    const char* base =
        static_cast<const char*>(p_.k.data) + 2 * (place_.b * p_.k.stride_b + h * p_.k.stride_h);
    if (is_seen(tile)) {
      device::copy_rows<typename T::Layout, kProbeThreads>(
          buffer(i), thread_, 2 * p_.head_dim, [&](int row) -> device::RowSource {
            const int32_t key = tile.key[row];
            return {base + (key < 0 ? 0 : key) * 2 * p_.k.stride_s, key >= 0};
          });
    }
  }

  PERMATTN_DEVICE static bool is_seen(const ProbeTile& tile) {
    return (tile.seen[0] | tile.seen[1]) != 0;
  }

  PERMATTN_DEVICE void multiply(const ProbeTile& tile, const char* keys, ProbeScores<T>& score) {
    constexpr float kLog2E = 1.4426950408889634F;
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; ++n) sm80::clear(score[n]);
    if (is_seen(tile) && first_row_ < p_.rows) {
      const auto address = device::MatrixAddress<typename T::Layout>::of_b(
          static_cast<uint32_t>(keys - shared_), lane_);
#pragma unroll
      for (int step = 0; step < T::kSteps; ++step) {
#pragma unroll
        for (int n = 0; n < T::kKeyTiles; n += 2) {
          uint32_t b[4];
          ptx::ldmatrix_x4<false>(b, shared_ + address.at(8 * n, step));
          const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
          T::Product::multiply(score[n], q_[step], first);
          T::Product::multiply(score[n + 1], q_[step], second);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t key = tile.key[8 * n + lane_ % 4 * 2 + i % 2];
        const bool sees = key >= 0 && key <= last_key_[i / 2];
        score[n][i] = sees ? score[n][i] * kLog2E : -__builtin_inff();
      }
    }
  }
};

// First sweep: largest score and sum of every row.
template <class T>
PERMATTN_DEVICE void probe_totals(const ProbeArgs& args, char* shared) {
  const ProbePlace place(args);
  ProbeSweep<T> sweep(args, place, shared);
  float top[2] = {-__builtin_inff(), -__builtin_inff()}, sum[2] = {};
  int64_t stop = place.first + kProbeSplit;
  if (args.p.size < stop) stop = args.p.size;
  // No row sees what lies behind the last one.
  if (args.p.order == nullptr && place.last + 1 < stop) stop = place.last + 1;
  sweep.run(stop, [&](int64_t, const ProbeTile&, const ProbeScores<T>& score) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float now = top[half];
#pragma unroll
      for (int n = 0; n < T::kKeyTiles; ++n) {
        now = fmaxf(now, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
      }
      now = ptx::quad_max(now);
      // A row that has seen nothing keeps -inf, and -inf - -inf must not become NaN.
      const float safe = now == -__builtin_inff() ? 0.0F : now;
      sum[half] *= ptx::exp2_approx(top[half] - safe);
#pragma unroll
      for (int n = 0; n < T::kKeyTiles; ++n) {
        sum[half] += ptx::exp2_approx(score[n][2 * half] - safe) +
                     ptx::exp2_approx(score[n][2 * half + 1] - safe);
      }
      top[half] = now;
    }
  });
  const int32_t thread = static_cast<int32_t>(threadIdx.x), lane = thread % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += permute::shuffle_xor(sum[half], 1);
    sum[half] += permute::shuffle_xor(sum[half], 2);
    const int64_t at = (place.head * args.splits + place.split) * kProbeRows + thread / 32 * 16 +
                       lane / 4 + 8 * half;
    if (lane % 4 != 0) continue;
    args.top[at] = top[half];
    args.sum[at] = sum[half];
  }
}

// Sums of all splits as the lse of a head's rows. Groups of threads take every fourth split, and
// their sums are merged in order.
PERMATTN_DEVICE void merge_totals(const ProbeArgs& args, char* shared) {
  constexpr int kGroups = kMergeThreads / kProbeRows;
  constexpr float kLn2 = 0.6931471805599453F;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t row = thread % kProbeRows, group = thread / kProbeRows;
  auto* tops = reinterpret_cast<float*>(shared);
  float* sums = tops + kMergeThreads;
  float top = -__builtin_inff(), sum = 0.0F;
  const auto add = [&](float other_top, float other_sum) {
    const float now = fmaxf(top, other_top);
    const float safe = now == -__builtin_inff() ? 0.0F : now;
    sum = sum * ptx::exp2_approx(top - safe) + other_sum * ptx::exp2_approx(other_top - safe);
    top = now;
  };
  const int64_t first = static_cast<int64_t>(blockIdx.x) * args.splits;
  for (int32_t split = group; split < args.splits; split += kGroups) {
    const int64_t at = (first + split) * kProbeRows + row;
    add(args.top[at], args.sum[at]);
  }
  tops[thread] = top;
  sums[thread] = sum;
  __syncthreads();
  if (group != 0 || row >= args.p.rows) return;
  for (int other = 1; other < kGroups; ++other) {
    add(tops[other * kProbeRows + row], sums[other * kProbeRows + row]);
  }
  args.p.lse[static_cast<int64_t>(blockIdx.x) * args.p.rows + row] =
      sum == 0.0F ? -__builtin_inff() : (top + ptx::log2_approx(sum)) * kLn2;
}

// Sums of one tile of probabilities in shared memory.
template <class T>
class ProbeSums {
 public:
  PERMATTN_DEVICE ProbeSums(const ProbeArgs& args, const ProbePlace& place, char* shared)
      : args_(args),
        p_(args.p),
        place_(place),
        books_(*reinterpret_cast<typename T::Books*>(shared + T::kBooksOffset)),
        thread_(static_cast<int32_t>(threadIdx.x)),
        last_lag_(static_cast<int64_t>(args.p.first_coordinate[place.b]) + kProbeRows - 1) {
    if (thread_ < kProbeKeys) books_.carry[thread_] = 0.0F;
  }

  PERMATTN_DEVICE void add(int64_t first, const ProbeTile& tile) {
    const float carried = thread_ < kProbeKeys ? books_.carry[thread_] : 0.0F;
    add_column(first, tile);
    __syncthreads();
    const float sum = diagonal();
    if (thread_ >= kProbeKeys) {
      books_.carry[thread_ - kProbeKeys] = sum;
      return;
    }
    const int64_t lag = last_lag_ - first - thread_;
    if (lag < 0 || lag >= p_.size) return;
    p_.diagonal[place_.head * p_.size + lag] = (sum + carried) * args_.mean;
  }

  PERMATTN_DEVICE void leave_edge() {
    if (thread_ >= kProbeKeys) return;
    const int64_t at = place_.head * args_.splits + place_.split;
    args_.edge[at * kProbeKeys + thread_] = books_.carry[thread_] * args_.mean;
  }

 private:
  const ProbeArgs& args_;
  const ProbeParams& p_;
  const ProbePlace& place_;
  typename T::Books& books_;
  int32_t thread_;
  int64_t last_lag_;  // of the first coordinate there could be

  // Two threads a column, pairs of rows in turn.
  PERMATTN_DEVICE void add_column(int64_t first, const ProbeTile& tile) {
    const int column = thread_ / 2, half = thread_ % 2;
    float sum = 0.0F, square = 0.0F;
    const auto for_rows = [&](const auto& visit) {
#pragma unroll
      for (int i = 0; i < kProbeRows / 2; ++i) {
        visit(books_.p[(i / 2 * 4 + 2 * half + i % 2) * kProbeStride + column]);
      }
    };
    for_rows([&](float x) {
      sum += x;
      square += x * x;
    });
    sum += permute::shuffle_xor(sum, 1);
    square += permute::shuffle_xor(square, 1);
    if ((tile.skipped[column / 32] >> column % 32 & 1U) != 0) {
      for_rows([](float& x) { x = 0.0F; });
    }
    if (half != 0 || first + column >= p_.size) return;
    const int64_t at = place_.head * p_.size + first + column;
    p_.column[at] = sum * args_.mean;
    p_.square[at] = square * args_.mean;
  }

  // A thread's own one: row r, column thread - 63 + r.
  PERMATTN_DEVICE float diagonal() const {
    const int begin = thread_ < kProbeRows ? kProbeRows - 1 - thread_ : 0;
    const int stop = thread_ < kProbeRows ? kProbeRows : 2 * kProbeRows - 1 - thread_;
    float sum = 0.0F;
    for (int row = begin; row < stop; ++row) {
      sum += books_.p[row * kProbeStride + thread_ - (kProbeRows - 1) + row];
    }
    return sum;
  }
};

// Second sweep: columns and diagonals of one split of the axis.
template <class T>
PERMATTN_DEVICE void probe_masses(const ProbeArgs& args, char* shared) {
  constexpr float kLog2E = 1.4426950408889634F;
  struct alignas(8) Pair {
    float low, high;
  };
  const ProbeParams& p = args.p;
  const ProbePlace place(args);
  ProbeSweep<T> sweep(args, place, shared);
  ProbeSums<T> sums(args, place, shared);
  auto& books = *reinterpret_cast<typename T::Books*>(shared + T::kBooksOffset);
  const int32_t thread = static_cast<int32_t>(threadIdx.x), lane = thread % 32;
  const int32_t row = thread / 32 * 16 + lane / 4;
  float lse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t at = row + 8 * half;
    const float given = at < p.rows ? p.lse[place.head * p.rows + at] : -__builtin_inff();
    // A row that sees nothing: 2^(-inf - inf) is 0, where 2^(-inf - -inf) is NaN.
    lse[half] = given == -__builtin_inff() ? __builtin_inff() : given * kLog2E;
  }
  // One tile past the last coordinate takes what the diagonals still carry.
  int64_t stop = place.first + kProbeSplit;
  if (p.size + kProbeKeys < stop) stop = p.size + kProbeKeys;
  sweep.run(stop, [&](int64_t first, const ProbeTile& tile, const ProbeScores<T>& score) {
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Pair pair{ptx::exp2_approx(score[n][2 * half] - lse[half]),
                        ptx::exp2_approx(score[n][2 * half + 1] - lse[half])};
        float* to = books.p + (row + 8 * half) * kProbeStride + 8 * n + lane % 4 * 2;
        *reinterpret_cast<Pair*>(to) = pair;
      }
    }
    __syncthreads();
    sums.add(first, tile);
  });
  sums.leave_edge();
}

// Adds what one split left to the lags of the next; no two blocks of threads share a lag.
PERMATTN_DEVICE void add_edge(const ProbeArgs& args) {
  const ProbeParams& p = args.p;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto splits = static_cast<uint32_t>(args.splits);
  const uint32_t split = blockIdx.x % splits, head = blockIdx.x / splits;
  const int64_t first = static_cast<int64_t>(split + 1) * kProbeSplit + thread;
  const int64_t last = p.first_coordinate[head / static_cast<uint32_t>(p.q_heads)];
  const int64_t lag = last + kProbeRows - 1 - first;
  // The last entry of an edge is empty: a diagonal has as many places as there are rows.
  if (thread >= kProbeKeys - 1 || lag < 0 || lag >= p.size) return;
  p.diagonal[head * p.size + lag] +=
      args.edge[static_cast<int64_t>(blockIdx.x) * kProbeKeys + thread];
}

}  // namespace permattn::index
