// ldmatrix and mma.sync of a warp, with fragments as the PTX manual draws them: lane = 4 row +
// pair.
#pragma once
#include "collectives.h"
#include "copies.h"
#include "numbers.h"

namespace shim {

struct MatrixLoad {
  const char* row;
  uint32_t* result;
};

// Eight rows of 16 bytes are read at once, from 32 banks of 4 bytes.
inline void count_conflicts(MatrixLoad** rows) {
  uint32_t used = 0;
  for (int r = 0; r < 8; ++r) {
    const uint32_t banks = 1U << (reinterpret_cast<uintptr_t>(rows[r]->row) / 16 % 8);
    statistics.bank_conflicts += (used & banks) != 0 ? 1 : 0;
    used |= banks;
  }
  ++statistics.matrix_loads;
}

template <bool kTransposed>
void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  check_shared(row, 16, "ldmatrix");
  observe::reads(row, 16);
  MatrixLoad mine{static_cast<const char*>(row), r};
  collective<MatrixLoad>(~0U, mine, [](MatrixLoad** lanes) {
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], lanes[8 * m + i]->row, 16);
      count_conflicts(lanes + 8 * m);
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = kTransposed ? matrix[j][i] : matrix[i][j];
        const uint32_t high = kTransposed ? matrix[j + 1][i] : matrix[i][j + 1];
        lanes[lane]->result[m] = low | high << 16;
      }
    }
  });
}

// How a word of a fragment is read: kCount numbers of kBits, the first in the low bits.
struct Bfloat16 {
  static constexpr int kCount = 2;
  using Number = float;
  static float at(uint32_t word, int i) { return float_from_bits(word >> 16 * i << 16); }
};
struct Float16 {
  static constexpr int kCount = 2;
  using Number = float;
  static float at(uint32_t word, int i) {
    const auto bits = static_cast<uint16_t>(word >> 16 * i);
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return static_cast<float>(x);
  }
};
struct Float8 {
  static constexpr int kCount = 4;
  using Number = float;
  static float at(uint32_t word, int i) { return from_e4m3(word >> 8 * i & 0xFF); }
};
template <int kBits, bool kSigned>
struct Integer {
  static constexpr int kCount = 32 / kBits;
  using Number = int32_t;
  static int32_t at(uint32_t word, int i) {
    const auto x = static_cast<int32_t>(word >> kBits * i & ((1U << kBits) - 1));
    return kSigned && x >> (kBits - 1) != 0 ? x - (1 << kBits) : x;
  }
};

template <class Number>
struct Product {
  Number* c;
  const uint32_t *a, *b;
};

template <class A, class B, class Number>
void multiply(Number (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product<Number> mine{c, a, b};
  collective<Product<Number>>(~0U, mine, [](Product<Number>** lanes) {
    constexpr int kHalf = 4 * A::kCount;  // of the summed axis: one word of four lanes
    Number rows[16][2 * kHalf], columns[8][2 * kHalf];
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, first = lane % 4 * A::kCount;
      for (int i = 0; i < A::kCount; ++i) {
        for (int half = 0; half < 2; ++half) {
          rows[row][half * kHalf + first + i] = A::at(lanes[lane]->a[2 * half], i);
          rows[row + 8][half * kHalf + first + i] = A::at(lanes[lane]->a[2 * half + 1], i);
          columns[row][half * kHalf + first + i] = B::at(lanes[lane]->b[half], i);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const Number* row = rows[lane / 4 + i / 2 * 8];
        const Number* column = columns[lane % 4 * 2 + i % 2];
        Number sum = 0;
        for (int k = 0; k < 2 * kHalf; ++k) sum += row[k] * column[k];
        lanes[lane]->c[i] += sum;
      }
    }
  });
}

using Sum = float (&)[4];
using IntegerSum = int32_t (&)[4];
using WordsA = const uint32_t (&)[4];
using WordsB = const uint32_t (&)[2];

inline void mma_bf16(Sum c, WordsA a, WordsB b) { multiply<Bfloat16, Bfloat16>(c, a, b); }
inline void mma_f16(Sum c, WordsA a, WordsB b) { multiply<Float16, Float16>(c, a, b); }
inline void mma_e4m3(Sum c, WordsA a, WordsB b) { multiply<Float8, Float8>(c, a, b); }
inline void mma_s8(IntegerSum c, WordsA a, WordsB b) {
  multiply<Integer<8, true>, Integer<8, true>>(c, a, b);
}
inline void mma_u8s8(IntegerSum c, WordsA a, WordsB b) {
  multiply<Integer<8, false>, Integer<8, true>>(c, a, b);
}
inline void mma_s4(IntegerSum c, WordsA a, WordsB b) {
  multiply<Integer<4, true>, Integer<4, true>>(c, a, b);
}
inline void mma_u4s4(IntegerSum c, WordsA a, WordsB b) {
  multiply<Integer<4, false>, Integer<4, true>>(c, a, b);
}

}  // namespace shim
