#include "file.h"

#include <fstream>

namespace replay {
namespace {

// Of torch's allocator; a kernel that wants more must not get it by chance.
constexpr size_t kAlignment = 64;

class Reader {
 public:
  explicit Reader(const char* path) : path_(path), in_(path, std::ios::binary) {}

  uint64_t number() {
    uint64_t x = 0;
    bytes(&x, sizeof(x));
    return x;
  }
  std::string text() {
    std::string made(number(), '\0');
    bytes(made.data(), made.size());
    return made;
  }
  void bytes(void* to, size_t count) {
    if (!in_.read(static_cast<char*>(to), static_cast<std::streamsize>(count))) {
      throw std::runtime_error(std::string(path_) + ": cannot be read, or ends too early");
    }
  }

 private:
  const char* path_;
  std::ifstream in_;
};

Region read_region(Reader& reader) {
  Region region;
  region.address = reader.number();
  region.bytes = reader.number();
  region.is_defined = reader.number() != 0;
  void* made = nullptr;
  if (posix_memalign(&made, kAlignment, region.bytes) != 0) throw std::bad_alloc();
  region.memory.reset(static_cast<char*>(made));
  reader.bytes(made, region.bytes);
  return region;
}

Launch read_launch(Reader& reader) {
  Launch launch;
  launch.kernel = reader.text();
  launch.blocks = static_cast<uint32_t>(reader.number());
  launch.threads = static_cast<int32_t>(reader.number());
  launch.shared_bytes = reader.number();
  launch.parameters = reader.text();
  return launch;
}

}  // namespace

File read_file(const char* path) {
  Reader reader(path);
  File file;
  for (uint64_t left = reader.number(); left > 0; --left) {
    file.regions.push_back(read_region(reader));
  }
  for (uint64_t left = reader.number(); left > 0; --left) {
    file.launches.push_back(read_launch(reader));
  }
  return file;
}

void relocate(File& file) {
  for (Launch& launch : file.launches) {
    for (size_t at = 0; at + 8 <= launch.parameters.size(); at += 8) {
      uint64_t word = 0;
      std::memcpy(&word, &launch.parameters[at], 8);
      for (const Region& region : file.regions) {
        if (!region.holds(word)) continue;
        const auto now = reinterpret_cast<uint64_t>(region.memory.get()) + (word - region.address);
        std::memcpy(&launch.parameters[at], &now, 8);
        break;
      }
    }
  }
}

void write_memory(const File& file, const char* path) {
  std::ofstream out(path, std::ios::binary);
  for (const Region& region : file.regions) {
    out.write(region.memory.get(), static_cast<std::streamsize>(region.bytes));
  }
  if (!out.flush()) throw std::runtime_error(std::string(path) + ": cannot be written");
}

}  // namespace replay
