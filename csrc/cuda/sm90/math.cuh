// A warpgroup that multiplies: the 64 queries of its half against the keys that they want.
#pragma once
#include "../primitives/mbarrier.cuh"
#include "../primitives/warpgroup.cuh"
#include "epilogue.cuh"

namespace permattn::sm90 {

template <class T>
class Math {
 public:
  using Books = typename T::Books;
  using Tile = KeyTile<T::kBlockN>;

  // `thread`: of the warpgroup.
  PERMATTN_DEVICE Math(const LaunchArgs& launch, char* shared, int32_t half, int32_t thread)
      : launch_(launch),
        args_(launch.attention),
        shared_(shared),
        books_(*reinterpret_cast<Books*>(shared + T::kBooksOffset)),
        half_(half),
        thread_(thread) {}

  PERMATTN_DEVICE void run() {
    uint32_t parity = 0;
    for (auto i = static_cast<int32_t>(blockIdx.x); i < launch_.num_items;
         i += static_cast<int32_t>(gridDim.x)) {
      ptx::mbarrier_wait(books_.barriers + T::kFullQ, parity);
      parity ^= 1;
      const device::QueryTile mine = books_.halves[half_];
      const int32_t head = mine.b * args_.q_heads + mine.h;
      begin(mine, head);
      const bool has_keys = books_.has_keys;
      if (T::kQInRegisters || !has_keys) release(books_.barriers + T::kEmptyQ);
      if (has_keys) attend();
      if (!T::kQInRegisters && has_keys) release(books_.barriers + T::kEmptyQ);
      if (args_.acc != nullptr) {
        store_state<T>(args_, ptx::here(head), rows_, state_);
      } else {
        store_rows<T>(args_, ptx::here(head), rows_, state_);
      }
    }
  }

 private:
  using Sum = std::conditional_t<T::kQuantisedQk, int32_t, float>;
  using Product = std::conditional_t<T::kPv == Format::kInt8, int32_t, float>;
  static constexpr ptx::Operands kSixteen =
      T::kDtype == Dtype::kBFloat16 ? ptx::Operands::kBf16 : ptx::Operands::kF16;
  static constexpr ptx::Operands kScoreOperands = T::kQuantisedQk ? ptx::Operands::kS8 : kSixteen;
  static constexpr ptx::Operands kValueOperands = T::kPv == Format::kInt8  ? ptx::Operands::kU8S8
                                                  : T::kPv == Format::kFp8 ? ptx::Operands::kE4m3
                                                                           : kSixteen;

  const LaunchArgs& launch_;
  const AttentionArgs& args_;
  char* shared_;
  Books& books_;
  int32_t half_, thread_;
  ThreadRows rows_;
  Softmax<T> state_;
  uint32_t q_[T::kQInRegisters ? T::kQkSteps : 1][4];
  uint32_t p_[T::kPvSteps][4];
  Product product_[T::kQuantisedPv ? T::kProducts : 1];
  float weight_[2];  // of p_

  // The next tile to look at.
  Turn<T::kStages> turn_;
  int32_t ring_ = 0;
  bool at_end_ = false;  // the tile before it was the last of its item

  PERMATTN_DEVICE void release(uint64_t* barrier) {
    __syncwarp();
    if (thread_ % 32 == 0) ptx::mbarrier_arrive(barrier);
  }
  PERMATTN_DEVICE void advance() {
    turn_.advance();
    ring_ = ring_ == T::kRing - 1 ? 0 : ring_ + 1;
  }
  PERMATTN_DEVICE const char* q_tile() const {
    return shared_ + T::kQOffset + half_ * T::QLayout::kBytes;
  }

  // Tokens and factors of the thread's rows; its part of Q, where it stays in registers.
  PERMATTN_DEVICE void begin(const device::QueryTile& mine, int32_t head) {
    const int32_t thread = ptx::here(thread_), lane = thread % 32, first = thread / 32 * 16;
    rows_.pair = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t row = first + lane / 4 + 8 * i;
      rows_.token[i] = books_.q_tokens[half_ * kHalfRows + row];
      rows_.factor[i] = fmaxf(fabsf(args_.scale_log2), 1e-30F);
      if constexpr (T::kQuantisedQk) {
        const int64_t groups = (args_.num_q_slots + args_.q_rows - 1) / args_.q_rows;
        if (rows_.token[i] >= 0) {
          rows_.factor[i] *= args_.q_scale[static_cast<int64_t>(head) * groups +
                                           (mine.first_slot + row) / args_.q_rows];
        }
      }
    }
    load_state<T>(args_, head, rows_, state_);
    if constexpr (T::kQInRegisters) {
#pragma unroll
      for (int step = 0; step < T::kQkSteps; ++step) {
        ptx::ldmatrix_x4<false>(
            q_[step], q_tile() + T::QLayout::offset(first + lane % 16, 32 * step + lane / 16 * 16));
      }
    }
  }

  // The next tile that this half wants. Others are given back. False: the item is at its end.
  PERMATTN_DEVICE bool find() {
    while (!at_end_) {
      if (is_wanted()) return true;
      at_end_ = books_.tiles[ring_].is_last;
      release(books_.barriers + T::kEmptyK + turn_.stage);
      // Given back only now, as the values of the tile a ring earlier may still be read.
      ptx::mbarrier_wait(books_.barriers + T::kFullV + turn_.stage, turn_.parity);
      release(books_.barriers + T::kEmptyV + turn_.stage);
      advance();
    }
    return false;
  }

  PERMATTN_DEVICE bool is_wanted() {
    ptx::mbarrier_wait(books_.barriers + T::kFullK + turn_.stage, turn_.parity);
    return books_.tiles[ring_].is_seen(half_);
  }

  // S = Q K^T, under way.
  PERMATTN_DEVICE void multiply_keys(Sum (&sum)[T::kScores]) {
    const uint64_t k =
        ptx::k_major<typename T::KLayout>(shared_ + T::kKOffset + turn_.stage * T::kKBytes);
    using Step = ptx::Wgmma<kScoreOperands, false, T::kScores>;
    ptx::wgmma_fence();
    if constexpr (T::kQInRegisters) {
#pragma unroll
      for (int step = 0; step < T::kQkSteps; ++step) {
        Step::multiply(sum, q_[step], k + ptx::k_major_step<typename T::KLayout>(step) / 16,
                       step != 0);
      }
    } else {
      const uint64_t q = ptx::k_major<typename T::QLayout>(q_tile());
#pragma unroll
      for (int step = 0; step < T::kQkSteps; ++step) {
        Step::multiply(sum, q + ptx::k_major_step<typename T::QLayout>(step) / 16,
                       k + ptx::k_major_step<typename T::KLayout>(step) / 16, step != 0);
      }
    }
    ptx::wgmma_commit();
  }

  // acc += P V, or the product of small numbers, under way.
  PERMATTN_DEVICE void multiply_values(const Turn<T::kStages>& turn) {
    const char* v = shared_ + T::kVOffset + turn.stage * T::kVStride;
    ptx::mbarrier_wait(books_.barriers + T::kFullV + turn.stage, turn.parity);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < T::kPvSteps; ++step) {
      if constexpr (T::kQuantisedPv) {
        ptx::Wgmma<kValueOperands, false, T::kProducts>::multiply(
            product_, p_[step],
            ptx::k_major<typename T::VLayout>(v) +
                ptx::k_major_step<typename T::VLayout>(step) / 16,
            step != 0);
      } else {
        ptx::Wgmma<kValueOperands, true, T::kColumns>::multiply(
            state_.acc, p_[step],
            ptx::mn_major<typename T::VLayout>(v) +
                ptx::mn_major_step<typename T::VLayout>(step) / 16,
            true);
      }
    }
    ptx::wgmma_commit();
  }

  // After the wait for that product: products of small numbers are added up.
  PERMATTN_DEVICE void finish_values(const Turn<T::kStages>& turn) {
    hold_p();
    if constexpr (T::kQuantisedPv) {
      ptx::hold(product_);
      const auto* scale = reinterpret_cast<const float*>(
          shared_ + T::kVOffset + turn.stage * T::kVStride + T::kVScaleOffset);
#pragma unroll
      for (int i = 0; i < T::kColumns; ++i) {
        const float by = weight_[i % 4 / 2] * scale[i / 4 * 8 + 2 * rows_.pair + i % 2];
        state_.acc[i] = fmaf(value_of(product_[i]), by, state_.acc[i]);
      }
      if constexpr (T::kOnesRows > 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          state_.total[i] = fmaf(product_[T::kColumns + 2 * i], weight_[i], state_.total[i]);
        }
      }
    } else {
      ptx::hold(state_.acc);
    }
    release(books_.barriers + T::kEmptyV + turn.stage);
  }

  PERMATTN_DEVICE void hold_p() {
#pragma unroll
    for (int step = 0; step < T::kPvSteps; ++step) ptx::hold(p_[step]);
  }

  // After the wait for S: the keys are given back, and S becomes numbers.
  PERMATTN_DEVICE void finish_keys(Sum (&sum)[T::kScores], float (&score)[T::kScores]) {
    ptx::hold(sum);
    release(books_.barriers + T::kEmptyK + turn_.stage);
#pragma unroll
    for (int i = 0; i < T::kScores; ++i) score[i] = value_of(sum[i]);
  }

  // Keys of an item. Q K^T of a tile is under way together with P V of the one before it, and what
  // remains of P V while the scores become P.
  PERMATTN_DEVICE void attend() {
    Sum sum[T::kScores];
    float score[T::kScores];
    float by[2], weight[2] = {};
    at_end_ = false;
#pragma unroll 1
    while (find()) {
      multiply_keys(sum);
      ptx::wgmma_wait<0>();
      finish_keys(sum, score);
      const Tile* tile = &books_.tiles[ring_];
      exponentiate<T>(args_, rows_, half_, *tile, score, state_.high, by, weight_);
      shrink<T>(by, state_);
      pack_p<T>(score, p_, weight_, state_.total);
      Turn<T::kStages> last = turn_;
      at_end_ = tile->is_last;
      advance();
#pragma unroll 1
      while (!at_end_ && is_wanted()) {
        multiply_keys(sum);
        multiply_values(last);
        ptx::wgmma_wait<1>();
        finish_keys(sum, score);
        tile = &books_.tiles[ring_];
        exponentiate<T>(args_, rows_, half_, *tile, score, state_.high, by, weight);
        // ptxas moves exponentials behind a wait for products unless a block of instructions ends
        // between them. This wait is long over, and ends one. Where products of small numbers have
        // registers of their own there are none left for it.
        if constexpr (!T::kQuantisedPv) {
          ptx::mbarrier_wait(books_.barriers + T::kFullV + last.stage, last.parity);
        }
        ptx::wgmma_wait<0>();
        finish_values(last);
        weight_[0] = weight[0];
        weight_[1] = weight[1];
        shrink<T>(by, state_);
        pack_p<T>(score, p_, weight_, state_.total);
        last = turn_;
        at_end_ = tile->is_last;
        advance();
      }
      multiply_values(last);
      ptx::wgmma_wait<0>();
      finish_values(last);
    }
  }
};

}  // namespace permattn::sm90
