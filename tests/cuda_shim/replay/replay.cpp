// Runs recorded launches, or a planted fault, in code that is compiled with checks.
//
//   replay [options] IN OUT         launches of a file; memory afterwards goes to OUT
//   replay [options] --planted NAME
//   replay --list                   names of planted faults
//
//   --seed N                        of the schedule
//   --eager                         cp.async lands when it is issued
//   --leave-out KIND:N              passes over the N-th barrier, warp-barrier or wait of all
//   threads
//
// Ends with 0 where nothing was found; 2 where a launch failed; 3 where the checker of races found
// something; else as AddressSanitizer ends.
#include <cstdio>
#include <cstdlib>

#include "file.h"
#include "planted.h"

#if defined(__SANITIZE_ADDRESS__)
// A launch that fails leaves its fibers as they stand, with what they own.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

namespace {

constexpr int kFailed = 2, kFound = 3;

struct Command {
  std::vector<std::string> files;
  std::string planted;
  bool lists = false;
};

void leave_out(const std::string& what) {
  const size_t colon = what.find(':');
  if (colon == std::string::npos) throw std::invalid_argument("--leave-out wants KIND:N");
  const std::string kind = what.substr(0, colon);
  const int32_t number = std::stoi(what.substr(colon + 1));
  shim::LeftOut& left_out = shim::options.left_out;
  if (kind == "barrier") {
    left_out.barrier = number;
  } else if (kind == "warp-barrier") {
    left_out.warp_barrier = number;
  } else if (kind == "wait") {
    left_out.wait = number;
  } else {
    throw std::invalid_argument("--leave-out: nothing is called " + kind);
  }
}

Command parse(int count, char** words) {
  Command command;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const auto value = [&]() -> std::string {
      if (++i == count) throw std::invalid_argument(word + " wants a value");
      return words[i];
    };
    if (word == "--seed") {
      shim::options.seed = std::stoull(value());
    } else if (word == "--eager") {
      shim::options.eager = true;
    } else if (word == "--leave-out") {
      leave_out(value());
    } else if (word == "--planted") {
      command.planted = value();
    } else if (word == "--list") {
      command.lists = true;
    } else {
      command.files.push_back(word);
    }
  }
  if (!command.lists && command.planted.empty() && command.files.size() != 2) {
    throw std::invalid_argument("wants IN and OUT, or --planted NAME, or --list");
  }
  return command;
}

// What a launch did wrong, or an empty string.
std::string run_file(const char* in, const char* out) {
  replay::Registry registry;
  replay::add_attention_16(registry);
  replay::add_attention_small(registry);
  replay::add_prepare(registry);
  replay::add_index(registry);
  replay::add_probe(registry);
  replay::File file = replay::read_file(in);
  replay::relocate(file);
  for (const replay::Region& region : file.regions) {
    shim::observe::add_region(region.memory.get(), region.bytes, region.is_defined);
  }
  std::string what;
  for (const replay::Launch& launch : file.launches) {
    const char* error = registry.find(launch.kernel)(launch);
    if (error != nullptr) {
      what = launch.kernel + ": " + error;
      break;
    }
  }
  replay::write_memory(file, out);
  return what;
}

std::string run(const Command& command) {
  if (command.lists) {
    for (const std::string& name : replay::planted_names()) std::printf("%s\n", name.c_str());
    return {};
  }
  if (command.planted.empty()) {
    return run_file(command.files[0].c_str(), command.files[1].c_str());
  }
  const char* error = replay::run_planted(command.planted);
  return error == nullptr ? "" : error;
}

}  // namespace

int main(int count, char** words) {
  std::string what;
  try {
    what = run(parse(count, words));
  } catch (const std::exception& error) {
    what = error.what();
  }
  if (!what.empty()) std::fprintf(stderr, "%s\n", what.c_str());
  if (shim::observe::faults() > 0) return kFound;
  return what.empty() ? 0 : kFailed;
}
