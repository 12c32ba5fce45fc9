// Bulk copies of boxes of a tensor into shared memory (sm_90 on). What lies outside the tensor
// arrives as zeros, and counts as bytes.
#pragma once
#include "../tensor_map.h"
#include "mbarrier.cuh"

namespace permattn::ptx {

PERMATTN_DEVICE void prefetch_map(const cuda::TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

PERMATTN_DEVICE void tma_load_3d(void* to, const cuda::TensorMap* map, uint64_t* barrier,
                                 int32_t x0, int32_t x1, int32_t x2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2)
      : "memory");
}

PERMATTN_DEVICE void tma_load_4d(void* to, const cuda::TensorMap* map, uint64_t* barrier,
                                 int32_t x0, int32_t x1, int32_t x2, int32_t x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

}  // namespace permattn::ptx
