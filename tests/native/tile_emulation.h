// The AMX tile intrinsics that amx_math.inl uses, in plain C++, so that the kernel's own source
// runs on machines without tiles. Using a tile without a configuration is counted as an error.
#pragma once
#include <cstdint>
#include <cstring>

namespace tile_emulation {

struct State {
  uint8_t config[64] = {};
  alignas(64) uint8_t tile[8][16][64] = {};
  int errors = 0;
  int products = 0;
};
inline thread_local State state;

inline int num_rows(int t) {
  const bool configured = state.config[0] == 1 && state.config[48 + t] == 16;
  uint16_t column_bytes;
  std::memcpy(&column_bytes, state.config + 16 + 2 * t, 2);
  if (!configured || column_bytes != 64) ++state.errors;
  return configured ? 16 : 0;
}

inline float from_bf16(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void zero(int t) {
  for (int r = 0; r < num_rows(t); ++r) std::memset(state.tile[t][r], 0, 64);
}
inline void load(int t, const void* base, int64_t stride) {
  const auto* p = static_cast<const uint8_t*>(base);
  for (int r = 0; r < num_rows(t); ++r) std::memcpy(state.tile[t][r], p + r * stride, 64);
}
inline void store(int t, void* base, int64_t stride) {
  auto* p = static_cast<uint8_t*>(base);
  for (int r = 0; r < num_rows(t); ++r) std::memcpy(p + r * stride, state.tile[t][r], 64);
}
// C[m][n] += sum over the 4-byte steps k of product(A[m][k], B[k][n]).
template <class Number, class Product>
void multiply(int c, int a, int b, const Product& product) {
  ++state.products;
  num_rows(a);
  num_rows(b);
  for (int m = 0; m < num_rows(c); ++m) {
    for (int n = 0; n < 16; ++n) {
      Number sum;
      std::memcpy(&sum, state.tile[c][m] + 4 * n, 4);
      for (int k = 0; k < 16; ++k)
        sum += product(state.tile[a][m] + 4 * k, state.tile[b][k] + 4 * n);
      std::memcpy(state.tile[c][m] + 4 * n, &sum, 4);
    }
  }
}

inline void dot(int c, int a, int b) {
  multiply<float>(c, a, b, [](const uint8_t* x, const uint8_t* y) {
    return from_bf16(x) * from_bf16(y) + from_bf16(x + 2) * from_bf16(y + 2);
  });
}

template <class A, class B>
void dot_bytes(int c, int a, int b) {
  multiply<uint32_t>(c, a, b, [](const uint8_t* x, const uint8_t* y) {
    int32_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<A>(x[i]) * static_cast<B>(y[i]);
    return static_cast<uint32_t>(sum);
  });
}

}  // namespace tile_emulation

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#undef _tile_dpbsud
#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#define _tile_zero(t) tile_emulation::zero(t)
#define _tile_loadd(t, base, stride) tile_emulation::load(t, base, stride)
#define _tile_stored(t, base, stride) tile_emulation::store(t, base, stride)
#define _tile_dpbf16ps(c, a, b) tile_emulation::dot(c, a, b)
#define _tile_dpbusd(c, a, b) tile_emulation::dot_bytes<uint8_t, int8_t>(c, a, b)
#define _tile_dpbsud(c, a, b) tile_emulation::dot_bytes<int8_t, uint8_t>(c, a, b)
#define _tile_loadconfig(p) std::memcpy(tile_emulation::state.config, p, 64)
#define _tile_storeconfig(p) std::memcpy(p, tile_emulation::state.config, 64)
#define _tile_release() std::memset(tile_emulation::state.config, 0, 64)
