// What every CUDA operator checks, and where it launches. The tests compile the same operators for
// tensors of the CPU (PERMATTN_CUDA_SHIM), where there are no devices and no streams.
#pragma once
#include <numeric>
#include <optional>

#include "plan.h"

#if defined(PERMATTN_CUDA_SHIM)
#define PERMATTN_CUDA_KEY CPU
#else
#define PERMATTN_CUDA_KEY CUDA
#include <torch/csrc/stable/accelerator.h>
// The CPU build of torch has no such symbol: weak, so that one library serves both builds.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));
#endif

namespace permattn::binding {

// Makes the tensors' device the current one for a scope, and knows its stream.
class Launcher {
 public:
#if defined(PERMATTN_CUDA_SHIM)
  explicit Launcher(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit Launcher(const Tensor& x) : device_(device_of(x)), guard_(device_) {}
  void* stream() const {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "permattn: this torch was built without CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }

 private:
  static int32_t device_of(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), "permattn: wants the first tensor on a CUDA device");
    return x.get_device_index();
  }
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Kernels step in 16 bytes.
constexpr int64_t kAlignment = 16;

inline void check_device(const Tensor& x, const Tensor& like, const char* name) {
  const bool is_there = x.is_cuda() == like.is_cuda() && x.is_cpu() == like.is_cpu() &&
                        x.get_device_index() == like.get_device_index();
  STD_TORCH_CHECK(is_there, name, ": lies on another device than the first tensor");
}

inline void check_aligned_pointer(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % kAlignment == 0, name,
                  ": wants memory at a multiple of 16 bytes");
}

// [b, h, s, width] on q's device with rows that start at multiples of 16 bytes.
inline TensorView aligned_view_of(const Tensor& x, const Tensor& like, const char* name, int64_t b,
                                  int64_t h, int64_t s, int64_t width) {
  const TensorView view = view_of(x, name);
  STD_TORCH_CHECK(x.size(0) == b && x.size(1) == h && x.size(2) == s && x.size(3) == width, name,
                  ": wants shape [", b, ", ", h, ", ", s, ", ", width, "], got [", x.size(0), ", ",
                  x.size(1), ", ", x.size(2), ", ", x.size(3), "]");
  check_device(x, like, name);
  if (x.numel() == 0) return view;
  check_aligned_pointer(x, name);
  const auto bytes = static_cast<int64_t>(x.element_size());
  for (int axis = 0; axis < 3; ++axis) {
    STD_TORCH_CHECK(x.size(axis) == 1 || x.stride(axis) * bytes % kAlignment == 0, name,
                    ": strides must be multiples of 16 bytes, got ", x.stride(axis), " on axis ",
                    axis);
  }
  return view;
}

// Contiguous memory of so many numbers on q's device.
inline void* flat_data_of(const Tensor& x, const Tensor& like, const char* name, ScalarType dtype,
                          int64_t numbers) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_contiguous() && x.numel() == numbers, name,
                  ": wants ", numbers, " contiguous numbers of dtype ", static_cast<int>(dtype),
                  ", got ", x.numel());
  check_device(x, like, name);
  check_aligned_pointer(x, name);
  return x.data_ptr();
}

inline float* flat_floats_of(const Tensor& x, const Tensor& like, const char* name,
                             int64_t numbers) {
  return static_cast<float*>(flat_data_of(x, like, name, ScalarType::Float, numbers));
}

inline float* optional_flat_floats_of(const std::optional<Tensor>& x, const Tensor& like,
                                      const char* name, int64_t numbers) {
  return x.has_value() ? flat_floats_of(*x, like, name, numbers) : nullptr;
}

inline IntView device_ints_of(const Tensor& x, const Tensor& like, int64_t batch, int64_t heads,
                              const char* name) {
  check_device(x, like, name);
  return int_view_of(x, batch, heads, name);
}

// An argument of kernels that is 32 bits wide there.
inline int32_t narrow(int64_t x, int64_t least, const char* name) {
  STD_TORCH_CHECK(x >= least && x <= INT32_MAX, name, ": wants ", least, " to 2^31 - 1, got ", x);
  return static_cast<int32_t>(x);
}

inline Format format_of(int64_t number, const char* name) {
  STD_TORCH_CHECK(number >= 0 && number <= 3, name, ": no format of number ", number);
  return static_cast<Format>(number);
}

inline const char* name_of(Format format) {
  constexpr const char* kNames[] = {"none", "int8", "int4", "fp8"};
  return kNames[static_cast<int32_t>(format)];
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace permattn::binding
