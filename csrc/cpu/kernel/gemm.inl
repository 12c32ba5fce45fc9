// The one inner product: C[x][lane] += sum_k A[x][k] * B[k][lane], A broadcast, B and C in lanes.
// A step of k is 4 bytes of A: one float, or a pair of bfloat16 (see the Math types).

// Register blocks by the number of lane vectors: 24 accumulators (12 with 16 registers).
#if PERMATTN_WIDTH == 16
constexpr int kMaxPanel = 4;
PERMATTN_INLINE constexpr int block_rows(int vectors) {
  return vectors == 4 ? 6 : vectors == 3 ? 8 : vectors == 2 ? 12 : 16;
}
#else
constexpr int kMaxPanel = 2;
PERMATTN_INLINE constexpr int block_rows(int vectors) { return vectors == 2 ? 6 : 12; }
#endif

// Rows that a C (and so an A) buffer holds for `rows` of them: blocks are not cut at the end.
constexpr int kRowSlack = 16;

PERMATTN_INLINE constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class Math, int Vectors>
PERMATTN_INLINE void gemm_block(const float* a, int64_t a_row, int64_t a_step, const float* b,
                                float* c, int64_t steps, bool accumulate) {
  constexpr int kRows = block_rows(Vectors);
  constexpr int kLanes = Vectors * kWidth;
  VecF acc[kRows][Vectors];
#pragma GCC unroll 16
  for (int x = 0; x < kRows; ++x) {
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) {
      acc[x][y] = accumulate ? load(c + x * kLanes + y * kWidth) : VecF{};
    }
  }
  for (int64_t k = 0; k < steps; ++k) {
    VecF lane[Vectors];
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) lane[y] = load(b + y * kWidth);
#pragma GCC unroll 16
    for (int x = 0; x < kRows; ++x) {
      const VecF value = splat(a[x * a_row]);
#pragma GCC unroll 4
      for (int y = 0; y < Vectors; ++y) acc[x][y] = Math::multiply_add(acc[x][y], value, lane[y]);
    }
    a += a_step;
    b += kLanes;
  }
#pragma GCC unroll 16
  for (int x = 0; x < kRows; ++x) {
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) store(c + x * kLanes + y * kWidth, acc[x][y]);
  }
}

// rows is rounded up to whole blocks: A must be readable and C writable that far.
template <class Math, int Vectors>
PERMATTN_INLINE void gemm(const float* a, int64_t a_row, int64_t a_step, const float* b, float* c,
                          int64_t rows, int64_t steps, bool accumulate) {
  constexpr int kRows = block_rows(Vectors);
  for (int64_t x = 0; x < rows; x += kRows) {
    gemm_block<Math, Vectors>(a + x * a_row, a_row, a_step, b, c + x * Vectors * kWidth, steps,
                              accumulate);
  }
}
