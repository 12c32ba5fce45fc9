// Bare instructions of sm_90a: products of a warpgroup from shared memory and from registers, in
// every layout that the library uses, and boxes of tensors that reach out of bounds.
#include "cuda/primitives/tma.cuh"
#include "cuda/primitives/warpgroup.cuh"
#include "cuda/primitives/wgmma.cuh"

namespace ptx = permattn::ptx;
using Words = const uint32_t*;

namespace {

constexpr int kThreads = ptx::kWarpgroupThreads;

// Rows of 32-bit words into a tile, in its layout.
template <class Layout>
__device__ void fill(char* tile, Words from) {
  constexpr int kRowWords = Layout::kRowBytes / 4;
  for (int i = static_cast<int>(threadIdx.x); i < Layout::kRows * kRowWords; i += kThreads) {
    char* to = tile + Layout::offset(i / kRowWords, i % kRowWords * 4);
    *reinterpret_cast<uint32_t*>(to) = from[i];
  }
}

__device__ uint32_t word_of(float x) { return __float_as_uint(x); }
__device__ uint32_t word_of(int32_t x) { return static_cast<uint32_t>(x); }

template <class Number, int kCount>
__device__ void give(const Number (&d)[kCount], uint32_t* out) {
  for (int i = 0; i < kCount; ++i) out[kCount * threadIdx.x + i] = word_of(d[i]);
}

// a: 64 rows of kRowBytes; b: 2 kCount rows of as many, or, transposed, as many rows as a has
// numbers in a row, of 128 bytes. Where `in_registers`, a comes as fragments of four words a
// thread and step of 32 bytes.
template <ptx::Operands kOperands, bool kTransposed, int kCount, int kRowBytes, class Number>
__device__ void multiply(Words a, Words b, uint32_t* out, bool in_registers) {
  extern __shared__ __align__(1024) char shared[];
  constexpr int kSteps = kRowBytes / 32;
  using A = ptx::PanelLayout<64, kRowBytes>;
  using B = ptx::PanelLayout<kTransposed ? kRowBytes / 2 : 2 * kCount,
                             kTransposed ? 4 * kCount : kRowBytes>;
  using Step = ptx::Wgmma<kOperands, kTransposed, kCount>;
  char* const b_tile = shared + A::kBytes;
  if (!in_registers) fill<A>(shared, a);
  fill<B>(b_tile, b);
  ptx::fence_async_proxy();
  __syncthreads();
  uint32_t words[kSteps][4] = {};
  if (in_registers) {
    for (int step = 0; step < kSteps; ++step) {
      for (int i = 0; i < 4; ++i) words[step][i] = a[4 * (kThreads * step + threadIdx.x) + i];
      ptx::hold(words[step]);
    }
  }
  Number d[kCount] = {};
  ptx::hold(d);
  ptx::wgmma_fence();
  const uint64_t to_a = ptx::k_major<A>(shared);
  const uint64_t to_b = kTransposed ? ptx::mn_major<B>(b_tile) : ptx::k_major<B>(b_tile);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int forward = kTransposed ? ptx::mn_major_step<B>(step) : ptx::k_major_step<B>(step);
    if (in_registers) {
      Step::multiply(d, words[step], to_b + forward / 16, step != 0);
    } else {
      Step::multiply(d, to_a + ptx::k_major_step<A>(step) / 16, to_b + forward / 16, step != 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::hold(d);
  give(d, out);
}

// Boxes of 16 rows of kRowBytes at the places in `at`, three numbers each, as they lie.
template <int kRowBytes>
__device__ void boxes(const permattn::cuda::TensorMap* map, const int32_t* at, uint32_t* out) {
  extern __shared__ __align__(1024) char shared[];
  constexpr int kBoxes = 5, kBytes = 16 * kRowBytes;
  auto* barrier = reinterpret_cast<uint64_t*>(shared + kBoxes * kBytes);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_expect(barrier, kBoxes * kBytes);
    for (int i = 0; i < kBoxes; ++i) {
      ptx::tma_load_3d(shared + i * kBytes, map, barrier, at[3 * i], at[3 * i + 1], at[3 * i + 2]);
    }
    ptx::mbarrier_arrive(barrier);
  }
  ptx::mbarrier_wait(barrier, 0);
  const auto* words = reinterpret_cast<const uint32_t*>(shared);
  for (int i = static_cast<int>(threadIdx.x); i < kBoxes * kBytes / 4; i += kThreads) {
    out[i] = words[i];
  }
}

}  // namespace

#define PRODUCT(name, operands, transposed, count, bytes, Number)                          \
  extern "C" __global__ void __launch_bounds__(kThreads)                                   \
      name##_ss(Words a, Words b, uint32_t* out) {                                         \
    multiply<ptx::Operands::operands, transposed, count, bytes, Number>(a, b, out, false); \
  }                                                                                        \
  extern "C" __global__ void __launch_bounds__(kThreads)                                   \
      name##_rs(Words a, Words b, uint32_t* out) {                                         \
    multiply<ptx::Operands::operands, transposed, count, bytes, Number>(a, b, out, true);  \
  }

PRODUCT(wgmma_bf16, kBf16, false, 32, 128, float)
PRODUCT(wgmma_bf16_64, kBf16, false, 32, 64, float)
PRODUCT(wgmma_bf16_32, kBf16, false, 32, 32, float)
PRODUCT(wgmma_bf16_mn, kBf16, true, 32, 128, float)
PRODUCT(wgmma_bf16_mn_n96, kBf16, true, 48, 64, float)
PRODUCT(wgmma_f16, kF16, false, 32, 128, float)
PRODUCT(wgmma_f16_mn, kF16, true, 32, 128, float)
PRODUCT(wgmma_s8, kS8, false, 32, 128, int32_t)
PRODUCT(wgmma_s8_64, kS8, false, 32, 64, int32_t)
PRODUCT(wgmma_u8s8, kU8S8, false, 32, 64, int32_t)
PRODUCT(wgmma_e4m3, kE4m3, false, 36, 64, float)

#define BOXES(bytes)                                                                             \
  extern "C" __global__ void __launch_bounds__(kThreads) tma_##bytes(                            \
      const __grid_constant__ permattn::cuda::TensorMap map, const int32_t* at, uint32_t* out) { \
    boxes<bytes>(&map, at, out);                                                                 \
  }

BOXES(128)
BOXES(64)
BOXES(32)
