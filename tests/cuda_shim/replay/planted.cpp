#include "planted.h"

#include <map>

#include "module/fixtures.h"

namespace replay {
namespace {

constexpr int kThreads = fixtures::kThreads;

struct PlantedArgs {
  const float* in;  // [kThreads]
  float* out;       // [kThreads]
  int32_t rows, stride;
};

struct alignas(16) Chunk {
  float x[4];
};

PERMATTN_GLOBAL void load_past_the_end(const PlantedArgs args) {
  args.out[threadIdx.x] = args.in[threadIdx.x + 1];
}

PERMATTN_GLOBAL void store_past_shared_memory(const PlantedArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  reinterpret_cast<float*>(shared)[threadIdx.x + 1] = args.in[threadIdx.x];
}

PERMATTN_GLOBAL void load_misaligned(const PlantedArgs args) {
  if (threadIdx.x != 0) return;
  const Chunk chunk = *reinterpret_cast<const Chunk*>(args.in + 1);
  args.out[0] = chunk.x[3];
}

PERMATTN_GLOBAL void overflow_an_index(const PlantedArgs args) {
  const int32_t row = args.rows - 1 + static_cast<int32_t>(threadIdx.x);
  const int32_t place = row * args.stride;
  args.out[threadIdx.x] = args.in[place % kThreads >= 0 ? place % kThreads : 0];
}

PERMATTN_GLOBAL void read_what_nothing_wrote(const PlantedArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  auto* numbers = reinterpret_cast<float*>(shared);
  if (threadIdx.x % 2 == 0) numbers[threadIdx.x] = args.in[threadIdx.x];
  __syncthreads();
  args.out[threadIdx.x] = numbers[kThreads - 1 - threadIdx.x];
}

PERMATTN_GLOBAL void read_scratch_that_nothing_wrote(const PlantedArgs args) {
  args.out[threadIdx.x] += args.in[threadIdx.x];
}

PERMATTN_GLOBAL void write_one_place_from_two_blocks(const PlantedArgs args) {
  constexpr unsigned kEach = kThreads / 2;
  if (threadIdx.x >= kEach) return;
  args.out[blockIdx.x * (kEach - 1) + threadIdx.x] = args.in[threadIdx.x];
}

PERMATTN_GLOBAL void read_what_another_block_writes(const PlantedArgs args) {
  if (blockIdx.x == 0) args.out[threadIdx.x] = args.in[threadIdx.x];
  if (blockIdx.x == 1 && threadIdx.x == 0) args.out[kThreads - 1] += 1.0F;
}

// A vote is no barrier: it says nothing of memory.
PERMATTN_GLOBAL void exchange_with_a_vote(const PlantedArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  auto* numbers = reinterpret_cast<float*>(shared);
  numbers[threadIdx.x] = args.in[threadIdx.x];
  const bool all = permattn::ptx::ballot(true) == ~0U;
  args.out[threadIdx.x] = all ? numbers[threadIdx.x ^ 1U] : 0.0F;
}

PERMATTN_GLOBAL void exchange_with_a_warp_barrier(const PlantedArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  auto* numbers = reinterpret_cast<float*>(shared);
  numbers[threadIdx.x] = args.in[threadIdx.x];
  __syncwarp();
  args.out[threadIdx.x] = numbers[threadIdx.x ^ 1U];
}

// Of another warp, for which its barriers do not count.
PERMATTN_GLOBAL void exchange_past_the_warp(const PlantedArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  auto* numbers = reinterpret_cast<float*>(shared);
  numbers[threadIdx.x] = args.in[threadIdx.x];
  __syncwarp();
  args.out[threadIdx.x] = numbers[threadIdx.x ^ 32U];
}

const char* run_kernel(void (*kernel)(PlantedArgs), unsigned blocks, bool out_is_defined = true) {
  // Exactly as long as it says, for AddressSanitizer.
  std::vector<float> in(kThreads, 1.0F), out(kThreads, 0.0F);
  in.shrink_to_fit();
  out.shrink_to_fit();
  const size_t bytes = kThreads * sizeof(float);
  shim::observe::add_region(in.data(), bytes, true);
  shim::observe::add_region(out.data(), bytes, out_is_defined);
  const PlantedArgs args{in.data(), out.data(), 1 << 20, 1 << 12};
  return shim::try_launch(kernel, blocks, kThreads, bytes, args);
}

// The kernel of fixtures.h.
const char* run_rotation(fixtures::Fault fault) {
  const bool is_right = fixtures::rotate(fault) == fixtures::rotate(fixtures::kNone);
  return is_right || fault != fixtures::kNone ? nullptr : "two runs differ";
}

using Run = const char* (*)();
const std::map<std::string, Run>& runs() {
  static const std::map<std::string, Run> all = {
      {"right", [] { return run_rotation(fixtures::kNone); }},
      {"right-in-a-warp", [] { return run_kernel(&exchange_with_a_warp_barrier, 1); }},
      {"no-wait", [] { return run_rotation(fixtures::kNoWait); }},
      {"no-first-barrier", [] { return run_rotation(fixtures::kNoFirstSync); }},
      {"no-second-barrier", [] { return run_rotation(fixtures::kNoSecondSync); }},
      {"no-warp-barrier", [] { return run_kernel(&exchange_with_a_vote, 1); }},
      {"barrier-of-one-warp", [] { return run_kernel(&exchange_past_the_warp, 1); }},
      {"uninitialised-shared", [] { return run_kernel(&read_what_nothing_wrote, 1); }},
      {"uninitialised-scratch",
       [] { return run_kernel(&read_scratch_that_nothing_wrote, 1, false); }},
      {"two-blocks-write", [] { return run_kernel(&write_one_place_from_two_blocks, 2); }},
      {"a-block-reads", [] { return run_kernel(&read_what_another_block_writes, 2); }},
      {"load-out-of-bounds", [] { return run_kernel(&load_past_the_end, 1); }},
      {"shared-store-out-of-bounds", [] { return run_kernel(&store_past_shared_memory, 1); }},
      {"misaligned", [] { return run_kernel(&load_misaligned, 1); }},
      {"signed-overflow", [] { return run_kernel(&overflow_an_index, 1); }},
  };
  return all;
}

}  // namespace

std::vector<std::string> planted_names() {
  std::vector<std::string> names;
  for (const auto& [name, run] : runs()) names.push_back(name);
  return names;
}

const char* run_planted(const std::string& name) {
  const auto found = runs().find(name);
  if (found == runs().end()) throw std::invalid_argument("nothing planted is called " + name);
  return found->second();
}

}  // namespace replay
