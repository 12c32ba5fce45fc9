// The kernels without torch or Python: every instruction set of this machine, in float32, against
// sums in double. One causal part with ragged lengths, one probe, and regions. Prints what it
// checked; exit code 1 on failure.
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

// Four heads of a map of 5 x 7 in boxes of 2 x 3, which hang over at two edges; every region looks
// at itself and at the next one.
struct RegionCase {
  static constexpr int64_t kHeads = 4, kHeight = 5, kWidth = 7, kTokens = kHeight * kWidth;
  static constexpr int64_t kRegions = 9;
  std::vector<float> q = numbers(kHeads * kTokens * kDim, 6),
                     k = numbers(kHeads * kTokens * kDim, 7),
                     v = numbers(kHeads * kTokens * kDimV, 8),
                     dout = numbers(kHeads * kTokens * kDimV, 9);
  std::vector<float> out = std::vector<float>(v.size(), NAN),
                     dq = std::vector<float>(q.size(), NAN), dk = dq, dv = out,
                     lse = std::vector<float>(kHeads * kTokens, NAN),
                     dlse = std::vector<float>(kHeads * kTokens, 0.0F);
  std::vector<int32_t> graph;

  // Tokens first, heads beside each other.
  static MapView map(std::vector<float>& x, int64_t dim) {
    return {x.data(), 0, dim, 0, kWidth * kHeads * dim, kHeads * dim, 1};
  }

  static int64_t region_of(int64_t token) { return token / kWidth / 2 * 3 + token % kWidth / 3; }

  void run(Isa isa) {
    for (int32_t r = 0; r < kRegions; ++r) {
      graph.push_back(r);
      graph.push_back((r + 1) % kRegions);
    }
    RegionBwdParams b{};
    RegionParams& p = b.forward;
    p.dtype = Dtype::kFloat32;
    p.batch = 1;
    p.heads = kHeads;
    p.head_dim = kDim;
    p.head_dim_v = kDimV;
    p.scale = 0.5F;
    p.q_grid = p.kv_grid = {{1, kHeight, kWidth}, {1, 2, 3}, {1, 3, 3}};
    p.q = map(q, kDim);
    p.k = map(k, kDim);
    p.v = map(v, kDimV);
    p.out = map(out, kDimV);
    p.lse = lse.data();
    p.graph = graph.data();
    p.topk = 2;
    cpu::attend_regions(p, isa, {2, run_on_threads});
    b.dout = map(dout, kDimV);
    b.dlse = dlse.data();
    b.dq = map(dq, kDim);
    b.dk = map(dk, kDim);
    b.dv = map(dv, kDimV);
    cpu::attend_regions_backward(b, isa, {2, run_on_threads});
  }

  // Of `out` and `lse` of one query of a head.
  double error_of(int64_t i, int64_t h) const {
    const int64_t at = i * kHeads + h, region = region_of(i);
    std::vector<double> row(kDimV, 0.0);
    double total = 0.0;
    for (int64_t j = 0; j < kTokens; ++j) {
      if (region_of(j) != region && region_of(j) != (region + 1) % kRegions) continue;
      const int64_t key = j * kHeads + h;
      double score = 0.0;
      for (int64_t d = 0; d < kDim; ++d) score += double{q[at * kDim + d]} * k[key * kDim + d];
      const double weight = std::exp(0.5 * score);
      total += weight;
      for (int64_t d = 0; d < kDimV; ++d) row[d] += weight * v[key * kDimV + d];
    }
    double worst = std::fabs(lse[h * kTokens + i] - std::log(total));
    for (int64_t d = 0; d < kDimV; ++d) {
      const double error = std::fabs(out[at * kDimV + d] - row[d] / total);
      worst = error <= worst ? worst : error;  // NaN wins
    }
    return worst;
  }
};

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * b[i];
  return sum;
}

// Gradients by what must hold of them: results are linear in V, and scores in Q as in K.
double worst_region_error(Isa isa) {
  RegionCase c;
  c.run(isa);
  double worst = 0.0;
  for (int64_t i = 0; i < RegionCase::kTokens; ++i) {
    for (int64_t h = 0; h < RegionCase::kHeads; ++h) {
      const double error = c.error_of(i, h);
      worst = error <= worst ? worst : error;
    }
  }
  const double size = std::sqrt(dot(c.out, c.out) * dot(c.dout, c.dout));
  for (const double error :
       {dot(c.v, c.dv) - dot(c.out, c.dout), dot(c.q, c.dq) - dot(c.k, c.dk)}) {
    worst = std::fabs(error) / size <= worst ? worst : std::fabs(error) / size;
  }
  return worst;
}

}  // namespace

int main() {
  bool good = true;
  for (int32_t i = 0; i < kNumIsas; ++i) {
    const auto isa = static_cast<Isa>(i);
    if (!cpu::isa_is_available(isa)) continue;
    double error = 0.0;
    for (const double e : {worst_error(isa), worst_probe_error(isa), worst_region_error(isa)}) {
      error = e <= error ? error : e;
    }
    std::printf("%-12s error %.1e\n", isa_name(isa), error);
    good = good && error < 4e-6;
  }
  return good ? 0 : 1;
}
