// Descriptions of tensors for bulk copies (TMA), made on the host.
#pragma once
#include <cstdint>

namespace permattn::cuda {

// What the hardware reads: opaque, and a kernel's parameter as it is.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

// A tensor and the boxes that are copied out of it, innermost axis first. Strides leave out the
// innermost axis. A row of a box is at most `swizzle` bytes.
struct TensorBox {
  const void* data;
  int32_t rank;
  int32_t element_bytes;  // 1 or 2
  int64_t dims[5];
  int64_t strides[4];  // bytes, multiples of 16
  int32_t box[5];
  int32_t swizzle;  // 32, 64 or 128 bytes
};

// Null, or why there is no such map.
const char* encode_tensor_map(const TensorBox& box, TensorMap* map);

}  // namespace permattn::cuda
