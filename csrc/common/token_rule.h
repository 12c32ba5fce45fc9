// The one mask rule, in C++. Twins: backends/reference.py and triton_kernels/token_rule.py.
#pragma once
#include <cstdint>
#include <limits>

#include "params.h"

namespace permattn {

// TokenBand with its open ends closed: inclusive lags that fit int32, as tokens do.
inline Band band_of(bool has_min, int64_t min_lag, bool has_max, int64_t max_lag) {
  constexpr int64_t kLow = std::numeric_limits<int32_t>::min();
  constexpr int64_t kHigh = std::numeric_limits<int32_t>::max();
  Band band{has_min ? min_lag : kLow, has_max ? max_lag - 1 : kHigh};
  if (band.min_lag > kHigh || band.max_lag < kLow) return {1, 0};
  band.min_lag = band.min_lag < kLow ? kLow : band.min_lag;
  band.max_lag = band.max_lag > kHigh ? kHigh : band.max_lag;
  return band;
}

// The band seen from one token of the streamed side: lane tokens in [token + offset, token + offset
// + width] are visible. Arithmetic is modulo 2^32, which is exact as every lag fits int32.
struct LaneRange {
  uint32_t offset, width;
  bool empty;
};

// Lanes are queries and the streamed token is a key: lane - token lies in [min_lag, max_lag].
inline LaneRange lanes_are_queries(const Band& band) {
  return {static_cast<uint32_t>(band.min_lag), static_cast<uint32_t>(band.max_lag - band.min_lag),
          band.max_lag < band.min_lag};
}

// Lanes are keys and the streamed token is a query: token - lane lies in [min_lag, max_lag].
inline LaneRange lanes_are_keys(const Band& band) {
  return {static_cast<uint32_t>(-band.max_lag), static_cast<uint32_t>(band.max_lag - band.min_lag),
          band.max_lag < band.min_lag};
}

PERMATTN_HD inline bool token_is_seen(uint32_t lane_token, uint32_t token, const LaneRange& range) {
  return lane_token - (token + range.offset) <= range.width;
}

}  // namespace permattn
