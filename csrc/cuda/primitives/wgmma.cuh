// Products of a warpgroup: d += a b over 64 rows (sm_90a). b lies in shared memory, a there too or
// in registers. Fragments of d and of a are, warp by warp, those of mma.sync's m16.
#pragma once
#include "memory.cuh"
#include "swizzle.cuh"

namespace permattn::ptx {

// Where a matrix lies in shared memory, as the hardware reads it. Distances between groups of
// eight rows of 16 bytes: `lead` along the panels, `stride` across them.
PERMATTN_DEVICE uint64_t matrix_descriptor(const void* start, int panel_bytes, int lead,
                                           int stride) {
  const uint64_t swizzle = panel_bytes == 128 ? 1 : panel_bytes == 64 ? 2 : 3;
  return static_cast<uint64_t>((shared_address(start) & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(lead >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         swizzle << 62;
}

// Of a tile whose rows are the operand's rows, and of byte offsets to steps of 32 bytes of them.
template <class Layout>
PERMATTN_DEVICE uint64_t k_major(const void* tile) {
  return matrix_descriptor(tile, Layout::kPanelBytes, 16, 8 * Layout::kPanelBytes);
}
template <class Layout>
PERMATTN_HD constexpr int k_major_step(int step) {
  constexpr int kSteps = Layout::kPanelBytes / 32;
  return step / kSteps * (Layout::kRows * Layout::kPanelBytes) + step % kSteps * 32;
}

// Of a tile of 16-bit numbers whose rows are summed over, and of offsets to steps of 16 rows.
template <class Layout>
PERMATTN_DEVICE uint64_t mn_major(const void* tile) {
  return matrix_descriptor(tile, Layout::kPanelBytes, Layout::kRows * Layout::kPanelBytes,
                           8 * Layout::kPanelBytes);
}
template <class Layout>
PERMATTN_HD constexpr int mn_major_step(int step) {
  return step * 16 * Layout::kPanelBytes;
}

// Registers that products read or write are as they are from here on.
PERMATTN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PERMATTN_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending groups of products are under way.
template <int kPending>
PERMATTN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from reading sums before the wait that stands above, or from writing them
// below the fence that stands below.
template <int kCount>
PERMATTN_DEVICE void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
PERMATTN_DEVICE void hold(int32_t (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
template <int kCount>
PERMATTN_DEVICE void hold(uint32_t (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

enum class Operands { kBf16, kF16, kS8, kU8S8, kE4m3 };

// b of 16-bit numbers may be transposed: then its rows are summed over.
template <Operands kOperands, bool kTransposed, int kCount>
struct Wgmma;

// clang-format off
#define PERMATTN_D16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PERMATTN_D32 PERMATTN_D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PERMATTN_D36 PERMATTN_D32 ",%32,%33,%34,%35"
#define PERMATTN_D48 PERMATTN_D36 ",%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define PERMATTN_D52 PERMATTN_D48 ",%48,%49,%50,%51"
#define PERMATTN_D64 PERMATTN_D52 ",%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define PERMATTN_D68 PERMATTN_D64 ",%64,%65,%66,%67"
#define PERMATTN_D128 PERMATTN_D68                                                              \
  ",%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89"    \
  ",%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109"  \
  ",%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define PERMATTN_R4(c, i) "+" c(d[i]), "+" c(d[i + 1]), "+" c(d[i + 2]), "+" c(d[i + 3])
#define PERMATTN_R16(c, i) PERMATTN_R4(c, i), PERMATTN_R4(c, i + 4), PERMATTN_R4(c, i + 8), PERMATTN_R4(c, i + 12)
#define PERMATTN_R32(c) PERMATTN_R16(c, 0), PERMATTN_R16(c, 16)
#define PERMATTN_R36(c) PERMATTN_R32(c), PERMATTN_R4(c, 32)
#define PERMATTN_R48(c) PERMATTN_R32(c), PERMATTN_R16(c, 32)
#define PERMATTN_R52(c) PERMATTN_R48(c), PERMATTN_R4(c, 48)
#define PERMATTN_R64(c) PERMATTN_R48(c), PERMATTN_R16(c, 48)
#define PERMATTN_R68(c) PERMATTN_R64(c), PERMATTN_R4(c, 64)
#define PERMATTN_R128(c) PERMATTN_R64(c), PERMATTN_R16(c, 64), PERMATTN_R16(c, 80), PERMATTN_R16(c, 96), PERMATTN_R16(c, 112)
// clang-format on

// Numbers of the operands behind n sums: `scale` is 0 where the sums begin with this product.
#define PERMATTN_WGMMA(operands, transposed, type, c, n, shape, from_shared, from_registers, o0,  \
                       o1, o2, o3, o4, o5)                                                        \
  template <>                                                                                     \
  struct Wgmma<Operands::operands, transposed, n> {                                               \
    PERMATTN_DEVICE static void multiply(type (&d)[n], uint64_t a, uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" o2                                        \
                   ", 0;\nwgmma.mma_async.sync.aligned." shape " {" PERMATTN_D##n                 \
                   "}, %" o0 ", %" o1 ", p" from_shared ";\n}"                                    \
                   : PERMATTN_R##n(c)                                                             \
                   : "l"(a), "l"(b), "r"(int(accumulate)));                                       \
    }                                                                                             \
    PERMATTN_DEVICE static void multiply(type (&d)[n], const uint32_t (&a)[4], uint64_t b,        \
                                         bool accumulate) {                                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" o5                                        \
                   ", 0;\nwgmma.mma_async.sync.aligned." shape " {" PERMATTN_D##n                 \
                   "}, {%" o0 ",%" o1 ",%" o2 ",%" o3 "}, %" o4 ", p" from_registers ";\n}"       \
                   : PERMATTN_R##n(c)                                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));   \
    }                                                                                             \
  };

#define PERMATTN_WGMMA_16(n, count, ...)                                                        \
  PERMATTN_WGMMA(kBf16, false, float, "f", count, "m64n" n "k16.f32.bf16.bf16", ", 1, 1, 0, 0", \
                 ", 1, 1, 0", __VA_ARGS__)                                                      \
  PERMATTN_WGMMA(kBf16, true, float, "f", count, "m64n" n "k16.f32.bf16.bf16", ", 1, 1, 0, 1",  \
                 ", 1, 1, 1", __VA_ARGS__)                                                      \
  PERMATTN_WGMMA(kF16, false, float, "f", count, "m64n" n "k16.f32.f16.f16", ", 1, 1, 0, 0",    \
                 ", 1, 1, 0", __VA_ARGS__)                                                      \
  PERMATTN_WGMMA(kF16, true, float, "f", count, "m64n" n "k16.f32.f16.f16", ", 1, 1, 0, 1",     \
                 ", 1, 1, 1", __VA_ARGS__)
#define PERMATTN_WGMMA_S8(n, count, ...) \
  PERMATTN_WGMMA(kS8, false, int32_t, "r", count, "m64n" n "k32.s32.s8.s8", "", "", __VA_ARGS__)
#define PERMATTN_WGMMA_U8S8(n, count, ...) \
  PERMATTN_WGMMA(kU8S8, false, int32_t, "r", count, "m64n" n "k32.s32.u8.s8", "", "", __VA_ARGS__)
#define PERMATTN_WGMMA_E4M3(n, count, ...)                                                \
  PERMATTN_WGMMA(kE4m3, false, float, "f", count, "m64n" n "k32.f32.e4m3.e4m3", ", 1, 1", \
                 ", 1, 1", __VA_ARGS__)

PERMATTN_WGMMA_16("64", 32, "32", "33", "34", "35", "36", "37")
PERMATTN_WGMMA_16("96", 48, "48", "49", "50", "51", "52", "53")
PERMATTN_WGMMA_16("128", 64, "64", "65", "66", "67", "68", "69")
PERMATTN_WGMMA_16("256", 128, "128", "129", "130", "131", "132", "133")
PERMATTN_WGMMA_S8("64", 32, "32", "33", "34", "35", "36", "37")
PERMATTN_WGMMA_S8("128", 64, "64", "65", "66", "67", "68", "69")
PERMATTN_WGMMA_U8S8("64", 32, "32", "33", "34", "35", "36", "37")
PERMATTN_WGMMA_U8S8("96", 48, "48", "49", "50", "51", "52", "53")
PERMATTN_WGMMA_U8S8("128", 64, "64", "65", "66", "67", "68", "69")
PERMATTN_WGMMA_E4M3("72", 36, "36", "37", "38", "39", "40", "41")
PERMATTN_WGMMA_E4M3("104", 52, "52", "53", "54", "55", "56", "57")
PERMATTN_WGMMA_E4M3("136", 68, "68", "69", "70", "71", "72", "73")

#undef PERMATTN_WGMMA

}  // namespace permattn::ptx
