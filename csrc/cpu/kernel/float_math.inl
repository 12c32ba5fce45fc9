// fp32 arithmetic on inputs of any type: A and B hold floats, a step of an inner product is one.
template <class Type_>
struct FloatMath {
  using Type = Type_;
  using Storage = typename Type::Storage;
  static constexpr int kPerStep = 1;  // numbers in one 4-byte step
  static constexpr int kStepBlock = 1;

  PERMATTN_INLINE VecF multiply_add(VecF acc, VecF a, VecF b) { return acc + a * b; }

  // Lanes [first, first + vectors * kWidth) of the tile as B[step][lane]; zeros in unused lanes.
  PERMATTN_INLINE void pack_lanes(const RowsOf<Storage>& rows, const Lanes& lanes, int first,
                                  int vectors, int64_t dim, float sign, float* b) {
    const int64_t width = vectors * kWidth;
    for (int group = 0; group < vectors; ++group) {
      const int lane = first + group * kWidth;
      for (int64_t d = 0; d < dim; d += kWidth) {
        VecF r[kWidth];
        for (int j = 0; j < kWidth; ++j) {
          const bool used = lane + j < lanes.count;
          r[j] = used ? load_up_to<Type>(rows[lanes.token[lane + j]] + d, dim - d) * sign : VecF{};
        }
        transpose(r);
        const int64_t n = dim - d < kWidth ? dim - d : kWidth;
        for (int64_t j = 0; j < n; ++j) store(b + (d + j) * width + group * kWidth, r[j]);
      }
    }
  }

  // Streamed rows as A[row][step].
  PERMATTN_INLINE void pack_rows(const RowsOf<Storage>& rows, const int32_t* token, int count,
                                 int64_t dim, int64_t stride, float* a) {
    for (int i = 0; i < count; ++i) {
      const Storage* row = rows[token[i]];
      for (int64_t d = 0; d < dim; d += kWidth) {
        store(a + i * stride + d, load_up_to<Type>(row + d, dim - d));
      }
    }
  }

  // Streamed rows as A[step][column], for products that sum over the rows: the same thing here.
  PERMATTN_INLINE void pack_columns(const RowsOf<Storage>& rows, const int32_t* token, int count,
                                    int64_t dim, int64_t stride, float* a) {
    pack_rows(rows, token, count, dim, stride, a);
  }

  template <int Vectors>
  PERMATTN_INLINE void scores(const float* k, int64_t k_stride, const float* q, float* s, int count,
                              int64_t steps) {
    gemm<FloatMath, Vectors>(k, k_stride, 1, q, s, count, steps, false);
  }

  template <int Vectors>
  PERMATTN_INLINE void values(const float* v, int64_t v_stride, const float* p, float* o, int count,
                              int64_t dim_v) {
    gemm<FloatMath, Vectors>(v, 1, v_stride, p, o, dim_v, count, true);
  }

  // Scores S[count][lane] to P[count][lane] = 2^(s * c - top), in place; returns sums in `sum`.
  template <int Vectors>
  PERMATTN_INLINE void probabilities(float* s, int count, float c, const VecF* top, VecF* sum) {
    for (int i = 0; i < count; ++i) {
      for (int y = 0; y < Vectors; ++y) {
        float* p = s + (i * Vectors + y) * kWidth;
        const VecF e = exp2_accurate(load(p) * c - top[y]);
        sum[y] += e;
        store(p, e);
      }
    }
  }

  // P[count][lane] of floats, in place, as `values` takes it: so it is.
  template <int Vectors>
  PERMATTN_INLINE void narrow(float*, int) {}
};
