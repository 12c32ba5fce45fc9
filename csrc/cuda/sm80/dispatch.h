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

template <Dtype kDtype, Format kQk, Format kPv>
struct Formats {};

template <Dtype kDtype, Format kQk, Format kPv, int kDim, int kRows>
struct Kernel {};

namespace detail {

template <Dtype kDtype, Format kQk, Format kPv, int kDim, class Visitor>
const char* visit_rows(int32_t rows, const Visitor& visitor) {
  if constexpr (tile_shape(kQk, kPv, kDim, 128).block_m != 0) {
    if (rows == 128) return visitor(Kernel<kDtype, kQk, kPv, kDim, 128>{});
  }
  if constexpr (tile_shape(kQk, kPv, kDim, 64).block_m != 0) {
    if (rows == 64) return visitor(Kernel<kDtype, kQk, kPv, kDim, 64>{});
  }
  return "sm80: no kernel for tiles of so many rows";
}

template <Format kQk, class Visitor>
const char* visit_dtypes(Dtype dtype, const Visitor& visitor) {
  if (dtype == Dtype::kBFloat16) return visitor(Formats<Dtype::kBFloat16, kQk, Format::kNone>{});
  return visitor(Formats<Dtype::kFloat16, kQk, Format::kNone>{});
}

}  // namespace detail

// visitor(Formats<...>{}) of a config; an error where there are no kernels for them. Where P V is
// quantised, one kernel writes every dtype, and its own is kFloat32.
template <class Visitor>
const char* visit_formats(const cuda::Config& config, Dtype dtype, const Visitor& visitor) {
  constexpr Dtype kAny = Dtype::kFloat32;
  constexpr auto kInt8 = Format::kInt8, kInt4 = Format::kInt4;
  if (config.pv == Format::kNone) {
    switch (config.qk) {
      case Format::kNone:
        return detail::visit_dtypes<Format::kNone>(dtype, visitor);
      case Format::kInt8:
        return detail::visit_dtypes<kInt8>(dtype, visitor);
      case Format::kInt4:
        return detail::visit_dtypes<kInt4>(dtype, visitor);
      case Format::kFp8:
        break;
    }
  }
  if (config.qk == kInt8 && config.pv == kInt8) return visitor(Formats<kAny, kInt8, kInt8>{});
  if (config.qk == kInt8 && config.pv == kInt4) return visitor(Formats<kAny, kInt8, kInt4>{});
  if (config.qk == kInt8 && config.pv == Format::kFp8) {
    return visitor(Formats<kAny, kInt8, Format::kFp8>{});
  }
  if (config.qk == kInt4 && config.pv == kInt4) return visitor(Formats<kAny, kInt4, kInt4>{});
  return "sm80: no kernel for these formats";
}

// visitor(Kernel<...>{}) of a config of these formats.
template <Dtype kDtype, Format kQk, Format kPv, class Visitor>
const char* visit_dims(const cuda::Config& config, const Visitor& visitor) {
  switch (config.dim) {
    case 64:
      return detail::visit_rows<kDtype, kQk, kPv, 64>(config.block_m, visitor);
    case 96:
      return detail::visit_rows<kDtype, kQk, kPv, 96>(config.block_m, visitor);
    case 128:
      return detail::visit_rows<kDtype, kQk, kPv, 128>(config.block_m, visitor);
    case 256:
      return detail::visit_rows<kDtype, kQk, kPv, 256>(config.block_m, visitor);
    default:
      return "sm80: no kernel for this head dim";
  }
}

template <class Visitor>
const char* visit_kernel(const cuda::Config& config, Dtype dtype, const Visitor& visitor) {
  return visit_formats(config, dtype,
                       [&]<Dtype kDtype, Format kQk, Format kPv>(Formats<kDtype, kQk, kPv>) {
                         return visit_dims<kDtype, kQk, kPv>(config, visitor);
                       });
}

}  // namespace permattn::sm80
