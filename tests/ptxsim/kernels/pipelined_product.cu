// S = A B^T by TMA, an mbarrier ring and wgmma: one warp produces, one warpgroup multiplies.
// kType: 0 = bf16, 1 = s8. Only what the simulator's tests need; no part of the library.
#include <cstdint>

struct alignas(64) TensorMap {
  char bytes[128];
};

struct Arguments {
  TensorMap a, b;
  void* sums;  // [rows of A, rows of B], 32-bit
  int columns, steps;
};

constexpr int kRows = 64, kColumns = 64, kRowBytes = 128, kStages = 2;
constexpr int kTileBytes = kRows * kRowBytes;

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ void load_box(uint32_t to, const TensorMap* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

__device__ uint64_t descriptor(uint32_t address) {
  const uint64_t stride = 8 * kRowBytes >> 4;
  return (address >> 4 & 0x3FFF) | uint64_t{1} << 16 | stride << 32 | uint64_t{1} << 62;
}

template <int kType>
struct Sum;
template <>
struct Sum<0> {
  using Type = float;
};
template <>
struct Sum<1> {
  using Type = int;
};

template <int kType, class T>
__device__ void multiply(T (&d)[32], uint64_t a, uint64_t b) {
#define REGISTERS                                                                           \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1"
#define EACH(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define ALL(c)                                                                            \
  EACH(c, 0), EACH(c, 4), EACH(c, 8), EACH(c, 12), EACH(c, 16), EACH(c, 20), EACH(c, 24), \
      EACH(c, 28)
  if constexpr (kType == 0) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGISTERS ", 1, 1, 0, 0;"
                 : ALL("+f")
                 : "l"(a), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " REGISTERS ";"
                 : ALL("+r")
                 : "l"(a), "l"(b));
  }
}

template <int kType>
__device__ void run(const Arguments& arguments) {
  using T = typename Sum<kType>::Type;
  constexpr int kPerRow = kType == 0 ? 64 : 128;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t tiles = shared_address(shared);
  const uint32_t full = tiles + 2 * kStages * kTileBytes, empty = full + 8 * kStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * s) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 128;" ::"r"(empty + 8 * s) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int row = blockIdx.y * kRows, column = blockIdx.x * kColumns;
  if (threadIdx.x >= 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 128) {
      for (int i = 0; i < arguments.steps; ++i) {
        const int stage = i % kStages, round = i / kStages;
        wait(empty + 8 * stage, (round & 1) ^ 1);
        asm volatile(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + 8 * stage),
            "r"(2 * kTileBytes)
            : "memory");
        const uint32_t to = tiles + 2 * stage * kTileBytes;
        load_box(to, &arguments.a, i * kPerRow, row, full + 8 * stage);
        load_box(to + kTileBytes, &arguments.b, i * kPerRow, column, full + 8 * stage);
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  T d[32] = {};
  for (int i = 0; i < arguments.steps; ++i) {
    const int stage = i % kStages;
    wait(full + 8 * stage, i / kStages & 1);
    const uint32_t a = tiles + 2 * stage * kTileBytes;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int k = 0; k < 4; ++k) {
      multiply<kType>(d, descriptor(a + 32 * k), descriptor(a + kTileBytes + 32 * k));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    arrive(empty + 8 * stage);
  }
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
  T* out = static_cast<T*>(arguments.sums);
  for (int r = 0; r < 32; ++r) {
    const int y = row + 16 * warp + group + 8 * (r >> 1 & 1);
    const int x = column + 8 * (r >> 2) + 2 * place + (r & 1);
    out[y * arguments.columns + x] = d[r];
  }
}

extern "C" __global__ __launch_bounds__(256) void product_bf16(
    const __grid_constant__ Arguments arguments) {
  run<0>(arguments);
}
extern "C" __global__ __launch_bounds__(256) void product_s8(
    const __grid_constant__ Arguments arguments) {
  run<1>(arguments);
}
