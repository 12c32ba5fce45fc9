#include "../tensor_map.h"

#include <cstring>

#if defined(__CUDACC__)
#include <cuda.h>
#include <cuda_runtime.h>
#endif

namespace permattn::cuda {

#if defined(__CUDACC__)

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver that is there, so that nothing links to it.
Encode find_encode() {
  constexpr unsigned kVersion = 12000;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             kVersion, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(found);
}

CUtensorMapSwizzle swizzle_of(int32_t bytes) {
  return bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                       : CU_TENSOR_MAP_SWIZZLE_32B;
}

}  // namespace

const char* encode_tensor_map(const TensorBox& box, TensorMap* map) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled";
  cuuint64_t dims[5], strides[4];
  cuuint32_t sizes[5], steps[5];
  for (int i = 0; i < box.rank; ++i) {
    dims[i] = static_cast<cuuint64_t>(box.dims[i]);
    sizes[i] = static_cast<cuuint32_t>(box.box[i]);
    steps[i] = 1;
    if (i + 1 < box.rank) strides[i] = static_cast<cuuint64_t>(box.strides[i]);
  }
  CUtensorMap made;
  const CUresult result = encode(
      &made,
      box.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
      static_cast<cuuint32_t>(box.rank), const_cast<void*>(box.data), dims, strides, sizes, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(box.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return "cuTensorMapEncodeTiled refused a tensor";
  static_assert(sizeof(made) == sizeof(*map));
  std::memcpy(map, &made, sizeof(made));
  return nullptr;
}

#else

// A plain record, for simulators of the hardware.
const char* encode_tensor_map(const TensorBox& box, TensorMap* map) {
  struct Record {
    char magic[8];
    int32_t rank, element_bytes;
    int64_t address;
    int64_t dims[5], strides[4];
    int32_t box[5], swizzle;
  } record{};
  static_assert(sizeof(record) <= sizeof(*map));
  std::memcpy(record.magic, "PMTENSOR", sizeof(record.magic));
  record.rank = box.rank;
  record.element_bytes = box.element_bytes;
  record.address = static_cast<int64_t>(reinterpret_cast<intptr_t>(box.data));
  std::memcpy(record.dims, box.dims, sizeof(record.dims));
  std::memcpy(record.strides, box.strides, sizeof(record.strides));
  std::memcpy(record.box, box.box, sizeof(record.box));
  record.swizzle = box.swizzle;
  *map = {};
  std::memcpy(map, &record, sizeof(record));
  return nullptr;
}

#endif

}  // namespace permattn::cuda
