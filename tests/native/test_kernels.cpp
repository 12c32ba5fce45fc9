// The kernels without torch or Python: every instruction set of this machine, in float32, against
// sums in double. One causal part with ragged lengths, and one probe. Prints what it checked; exit
// code 1 on failure.
#include "../../csrc/common/token_rule.h"
#include "../../csrc/cpu/cpu.h"

#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

using namespace permattn;

constexpr int64_t kQueries = 70, kKeys = 90, kDim = 40, kDimV = 24, kBlock = 16;

void run_on_threads(int64_t num_workers, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < num_workers; ++i) threads.emplace_back(body, context, i);
  for (std::thread& thread : threads) thread.join();
}

// A fixed sequence in [-1, 1].
std::vector<float> numbers(int64_t count, uint32_t seed) {
  std::vector<float> x(count);
  for (float& value : x) {
    seed = seed * 1664525U + 1013904223U;
    value = static_cast<float>(seed >> 8) / static_cast<float>(1 << 23) - 1.0F;
  }
  return x;
}

std::vector<int32_t> ascending(int64_t count) {
  std::vector<int32_t> x(count);
  for (int64_t i = 0; i < count; ++i) x[i] = static_cast<int32_t>(i);
  return x;
}

IntView view(const std::vector<int32_t>& x) {
  return {x.data(), 0, 0, static_cast<int64_t>(x.size())};
}

double worst_error(Isa isa) {
  const std::vector<float> q = numbers(kQueries * kDim, 1), k = numbers(kKeys * kDim, 2),
                           v = numbers(kKeys * kDimV, 3);
  const std::vector<int32_t> q_tokens = ascending(kQueries), kv_tokens = ascending(kKeys);
  constexpr int64_t kRows = (kQueries + kBlock - 1) / kBlock, kCols = (kKeys + kBlock - 1) / kBlock;
  std::vector<int32_t> indices, offsets{0};
  for (int64_t row = 0; row < kRows; ++row) {
    for (int32_t col = 0; col < kCols; ++col) indices.push_back(col);
    offsets.push_back(static_cast<int32_t>(indices.size()));
  }
  const std::vector<int32_t> num_full(kRows, 0);
  PlanPart part{};
  part.q_perm = {view(q_tokens), view(q_tokens)};
  part.kv_perm = {view(kv_tokens), view(kv_tokens)};
  part.index = {view(indices), view(offsets), view(num_full), kBlock, kBlock};
  part.band = band_of(true, 0, false, 0);
  std::vector<float> out(kQueries * kDimV, NAN), lse(kQueries, NAN);
  FwdParams params{};
  params.problem = {Dtype::kFloat32, 1, 1, 1, kQueries, kKeys, kDim, kDimV, 0.5F, &part, 1};
  params.q = {const_cast<float*>(q.data()), 0, 0, kDim};
  params.k = {const_cast<float*>(k.data()), 0, 0, kDim};
  params.v = {const_cast<float*>(v.data()), 0, 0, kDimV};
  params.out = {out.data(), 0, 0, kDimV};
  params.lse = lse.data();
  cpu::forward(params, isa, {2, run_on_threads});
  double worst = 0.0;
  for (int64_t i = 0; i < kQueries; ++i) {
    std::vector<double> row(kDimV, 0.0);
    double total = 0.0;
    for (int64_t j = 0; j <= i; ++j) {
      double score = 0.0;
      for (int64_t d = 0; d < kDim; ++d) score += double{q[i * kDim + d]} * k[j * kDim + d];
      const double weight = std::exp(0.5 * score);
      total += weight;
      for (int64_t d = 0; d < kDimV; ++d) row[d] += weight * v[j * kDimV + d];
    }
    worst = std::fmax(worst, std::fabs(lse[i] - std::log(total)));
    for (int64_t d = 0; d < kDimV; ++d) {
      const double error = std::fabs(out[i * kDimV + d] - row[d] / total);
      worst = error <= worst ? worst : error;  // NaN wins
    }
  }
  return worst;
}

// A probe of 5 rows over a permuted half of the keys, two coordinates without a key.
double worst_probe_error(Isa isa) {
  constexpr int64_t kRows = 5, kSize = kKeys / 2;
  const std::vector<float> q = numbers(kRows * kDim, 4), k = numbers(kKeys * kDim, 5);
  std::vector<int32_t> order(kSize);
  for (int64_t c = 0; c < kSize; ++c) order[c] = static_cast<int32_t>(2 * c + c % 2);
  order[3] = order[kSize - 2] = -1;
  const int32_t first_position = kKeys - 8, first_coordinate = kSize - 4;
  const int32_t key_range[2] = {2, kKeys - 1};
  std::vector<uint8_t> skip(kSize);
  for (int64_t c = 0; c < kSize; c += 6) skip[c] = 1;
  std::vector<float> lse(kRows, NAN), column(kSize, NAN), square(kSize, NAN), diagonal(kSize);
  ProbeParams p{};
  p.dtype = Dtype::kFloat32;
  p.batch = p.q_heads = p.kv_heads = 1;
  p.rows = kRows;
  p.skv = kKeys;
  p.size = kSize;
  p.head_dim = kDim;
  p.q = {const_cast<float*>(q.data()), 0, 0, kDim};
  p.k = {const_cast<float*>(k.data()), 0, 0, kDim};
  p.first_position = &first_position;
  p.first_coordinate = &first_coordinate;
  p.key_range = key_range;
  p.order = order.data();
  p.skip = skip.data();
  p.lse = lse.data();
  p.column = column.data();
  p.square = square.data();
  p.diagonal = diagonal.data();
  cpu::probe(p, isa, {2, run_on_threads});
  std::vector<double> want_column(kSize), want_square(kSize), want_diagonal(kSize);
  double worst = 0.0;
  for (int64_t r = 0; r < kRows; ++r) {
    std::vector<double> weight(kSize, 0.0);
    double total = 0.0;
    for (int64_t c = 0; c < kSize; ++c) {
      const int32_t key = order[c];
      if (key < key_range[0] || key >= key_range[1] || key > first_position + r) continue;
      double score = 0.0;
      for (int64_t d = 0; d < kDim; ++d) score += double{q[r * kDim + d]} * k[key * kDim + d];
      total += weight[c] = std::exp(score);
    }
    worst = std::fmax(worst, std::fabs(lse[r] - std::log(total)));
    for (int64_t c = 0; c < kSize; ++c) {
      const double probability = weight[c] / total;
      want_column[c] += probability / kRows;
      want_square[c] += probability * probability / kRows;
      const int64_t lag = first_coordinate + r - c;
      if (lag >= 0 && lag < kSize && skip[c] == 0) want_diagonal[lag] += probability / kRows;
    }
  }
  for (int64_t c = 0; c < kSize; ++c) {
    for (const double error :
         {column[c] - want_column[c], square[c] - want_square[c], diagonal[c] - want_diagonal[c]}) {
      worst = std::fabs(error) <= worst ? worst : std::fabs(error);  // NaN wins
    }
  }
  return worst;
}

}  // namespace

int main() {
  bool good = true;
  for (int32_t i = 0; i < kNumIsas; ++i) {
    const auto isa = static_cast<Isa>(i);
    if (!cpu::isa_is_available(isa)) continue;
    const double error = std::fmax(worst_error(isa), worst_probe_error(isa));
    std::printf("%-12s error %.1e\n", isa_name(isa), error);
    good = good && error < 4e-6;
  }
  return good ? 0 : 1;
}
