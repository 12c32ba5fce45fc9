// The inner products of regions: C[x][lane] += sum_k A[x][k] * B[k][lane]. A's H numbers of a step
// are those of H heads; they are repeated along the lanes. Rows of A lie anywhere, by pointers:
// keys of several small regions are one run of rows, and nothing is copied.

template <int Vectors>
constexpr int kBlockRows = Vectors == 4 || (kWidth < 16 && Vectors == 2) ? 4 : 8;

// A[x][k] = rows[x][k * H]; writes C.
template <class Math, int H, int Vectors>
PERMATTN_INLINE void block_of_rows(const float* const* rows, const float* b, float* c,
                                   int64_t steps) {
  constexpr int kRows = kBlockRows<Vectors>;
  constexpr int kLanes = Vectors * kWidth;
  const float* a[kRows];
  VecF acc[kRows][Vectors];
#pragma GCC unroll 8
  for (int x = 0; x < kRows; ++x) {
    a[x] = rows[x];
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) acc[x][y] = VecF{};
  }
  for (int64_t k = 0; k < steps; ++k) {
    VecF lane[Vectors];
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) lane[y] = load(b + k * kLanes + y * kWidth);
#pragma GCC unroll 8
    for (int x = 0; x < kRows; ++x) {
      const VecF value = broadcast<H>(a[x] + k * H);
#pragma GCC unroll 4
      for (int y = 0; y < Vectors; ++y) acc[x][y] = Math::multiply_add(acc[x][y], value, lane[y]);
    }
  }
#pragma GCC unroll 8
  for (int x = 0; x < kRows; ++x) {
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) store(c + x * kLanes + y * kWidth, acc[x][y]);
  }
}

// Scores of `count` rows, rounded up to whole blocks.
template <class Math, int H, int Vectors>
PERMATTN_INLINE void multiply_rows(const float* const* rows, const float* b, float* c, int count,
                                   int64_t steps) {
  constexpr int kRows = kBlockRows<Vectors>;
  for (int x = 0; x < count; x += kRows) {
    block_of_rows<Math, H, Vectors>(rows + x, b, c + x * Vectors * kWidth, steps);
  }
}

// A[x][k] = at[k][x * H]: sums over the rows.
template <class Math, int H, int Vectors>
PERMATTN_INLINE void block_of_columns(const float* const* at, int64_t first, const float* b,
                                      float* c, int64_t steps, bool accumulate) {
  constexpr int kRows = kBlockRows<Vectors>;
  constexpr int kLanes = Vectors * kWidth;
  VecF acc[kRows][Vectors];
#pragma GCC unroll 8
  for (int x = 0; x < kRows; ++x) {
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) {
      acc[x][y] = accumulate ? load(c + x * kLanes + y * kWidth) : VecF{};
    }
  }
  for (int64_t k = 0; k < steps; ++k) {
    const float* a = at[k] + first;
    VecF lane[Vectors];
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) lane[y] = load(b + k * kLanes + y * kWidth);
#pragma GCC unroll 8
    for (int x = 0; x < kRows; ++x) {
      const VecF value = broadcast<H>(a + x * H);
#pragma GCC unroll 4
      for (int y = 0; y < Vectors; ++y) acc[x][y] = Math::multiply_add(acc[x][y], value, lane[y]);
    }
  }
#pragma GCC unroll 8
  for (int x = 0; x < kRows; ++x) {
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) store(c + x * kLanes + y * kWidth, acc[x][y]);
  }
}

template <class Math, int H, int Vectors>
PERMATTN_INLINE void multiply_columns(const float* const* at, const float* b, float* c,
                                      int64_t columns, int64_t steps, bool accumulate) {
  constexpr int kRows = kBlockRows<Vectors>;
  for (int64_t x = 0; x < columns; x += kRows) {
    block_of_columns<Math, H, Vectors>(at, x * H, b, c + x * Vectors * kWidth, steps, accumulate);
  }
}

// A[x][k] = a[x * a_row + k * H] in Rows rows of C, which lie `width` apart as those of B: adds.
template <class Math, int H, int Rows, int Vectors>
PERMATTN_INLINE void block_of_sums(const float* a, int64_t a_row, const float* b, float* c,
                                   int64_t width, int64_t steps) {
  VecF acc[Rows][Vectors];
#pragma GCC unroll 8
  for (int x = 0; x < Rows; ++x) {
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) acc[x][y] = load(c + x * width + y * kWidth);
  }
  for (int64_t k = 0; k < steps; ++k) {
    VecF lane[Vectors];
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) lane[y] = load(b + k * width + y * kWidth);
#pragma GCC unroll 8
    for (int x = 0; x < Rows; ++x) {
      const VecF value = broadcast<H>(a + x * a_row + k * H);
#pragma GCC unroll 4
      for (int y = 0; y < Vectors; ++y) acc[x][y] = Math::multiply_add(acc[x][y], value, lane[y]);
    }
  }
#pragma GCC unroll 8
  for (int x = 0; x < Rows; ++x) {
#pragma GCC unroll 4
    for (int y = 0; y < Vectors; ++y) store(c + x * width + y * kWidth, acc[x][y]);
  }
}

template <class Math, int H, int Vectors>
PERMATTN_INLINE void add_panel(const float* a, int64_t a_row, const float* b, float* c,
                               int64_t width, int count, int64_t steps) {
  constexpr int kRows = kBlockRows<Vectors>;
  int x = 0;
  for (; x + kRows <= count; x += kRows) {
    block_of_sums<Math, H, kRows, Vectors>(a + x * a_row, a_row, b, c + x * width, width, steps);
  }
  // C's rows are exact: those behind belong to another region.
  for (; x < count; ++x) {
    block_of_sums<Math, H, 1, Vectors>(a + x * a_row, a_row, b, c + x * width, width, steps);
  }
}

// C[count][width] += A B, panel by panel of B's columns.
template <class Math, int H>
static __attribute__((noinline)) void add_products(const float* a, int64_t a_row, const float* b,
                                                   float* c, int64_t width, int count,
                                                   int64_t steps) {
  int64_t at = 0;
  for (; at + kMaxPanel * kWidth <= width; at += kMaxPanel * kWidth) {
    add_panel<Math, H, kMaxPanel>(a, a_row, b + at, c + at, width, count, steps);
  }
  for (; kMaxPanel > 2 && at + 2 * kWidth <= width; at += 2 * kWidth) {
    add_panel<Math, H, 2>(a, a_row, b + at, c + at, width, count, steps);
  }
  for (; at < width; at += kWidth) {
    add_panel<Math, H, 1>(a, a_row, b + at, c + at, width, count, steps);
  }
}
