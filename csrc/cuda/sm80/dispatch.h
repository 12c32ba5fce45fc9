// From a config to the kernel that it names.
#pragma once
#include "../config.h"
#include "shape.h"

namespace permattn::sm80 {

// Formats of (Q K^T, P V) that kernels exist for, as they are computed.
constexpr bool has_kernel(Format qk, Format pv) {
  switch (qk) {
    case Format::kNone:
      return pv == Format::kNone;
    case Format::kInt8:
      return true;
    case Format::kInt4:
      return pv == Format::kNone || pv == Format::kInt4;
    default:
      return false;
  }
}

template <Dtype kDtype, Format kQk, Format kPv, int kDim, int kRows>
struct Kernel {};

namespace detail {

template <Dtype kDtype, Format kQk, Format kPv, int kDim, class Visitor>
const char* visit_rows(int32_t rows, const Visitor& visitor) {
  if constexpr (tile_shape(kQk, kPv, kDim, 128).block_m != 0) {
    if (rows == 128) return visitor(Kernel<kDtype, kQk, kPv, kDim, 128>{});
  }
  if (rows == 64) return visitor(Kernel<kDtype, kQk, kPv, kDim, 64>{});
  return "no kernel for tiles of so many rows";
}

template <Dtype kDtype, Format kQk, Format kPv, class Visitor>
const char* visit_dims(const cuda::Config& config, const Visitor& visitor) {
  switch (config.dim) {
    case 64:
      return visit_rows<kDtype, kQk, kPv, 64>(config.block_m, visitor);
    case 96:
      return visit_rows<kDtype, kQk, kPv, 96>(config.block_m, visitor);
    case 128:
      return visit_rows<kDtype, kQk, kPv, 128>(config.block_m, visitor);
    default:
      return "no kernel for this head dim";
  }
}

template <Format kQk, class Visitor>
const char* visit_dtypes(const cuda::Config& config, Dtype dtype, const Visitor& visitor) {
  if (dtype == Dtype::kBFloat16) {
    return visit_dims<Dtype::kBFloat16, kQk, Format::kNone>(config, visitor);
  }
  return visit_dims<Dtype::kFloat16, kQk, Format::kNone>(config, visitor);
}

}  // namespace detail

// visitor(Kernel<...>{}) of the kernel for a config; an error where there is none. Where P V is
// quantised, one kernel writes every dtype, and its own is kFloat32.
template <class Visitor>
const char* visit_kernel(const cuda::Config& config, Dtype dtype, const Visitor& visitor) {
  constexpr Dtype kAny = Dtype::kFloat32;
  if (config.qk == Format::kNone && config.pv == Format::kNone) {
    return detail::visit_dtypes<Format::kNone>(config, dtype, visitor);
  }
  if (config.qk == Format::kInt8) {
    switch (config.pv) {
      case Format::kNone:
        return detail::visit_dtypes<Format::kInt8>(config, dtype, visitor);
      case Format::kInt8:
        return detail::visit_dims<kAny, Format::kInt8, Format::kInt8>(config, visitor);
      case Format::kInt4:
        return detail::visit_dims<kAny, Format::kInt8, Format::kInt4>(config, visitor);
      case Format::kFp8:
        return detail::visit_dims<kAny, Format::kInt8, Format::kFp8>(config, visitor);
    }
  }
  if (config.qk == Format::kInt4 && config.pv == Format::kNone) {
    return detail::visit_dtypes<Format::kInt4>(config, dtype, visitor);
  }
  if (config.qk == Format::kInt4 && config.pv == Format::kInt4) {
    return detail::visit_dims<kAny, Format::kInt4, Format::kInt4>(config, visitor);
  }
  return "no kernel for these formats";
}

}  // namespace permattn::sm80
