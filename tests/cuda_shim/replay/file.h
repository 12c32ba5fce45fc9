// What the Python side writes (replays.py): memory, and launches whose parameters point into it.
#pragma once
#include <memory>
#include <vector>

#include "registry.h"

namespace replay {

struct Region {
  uint64_t address = 0;  // where it lay when the launches were recorded
  uint64_t bytes = 0;
  bool is_defined = false;
  std::unique_ptr<char, void (*)(void*)> memory{nullptr, &std::free};

  // Where a recorded pointer points now. One past the end counts, as for any array.
  bool holds(uint64_t pointer) const { return pointer >= address && pointer - address <= bytes; }
};

struct File {
  std::vector<Region> regions;
  std::vector<Launch> launches;
};

// Throws where the file is not of this form. Memory has the very sizes of the file.
File read_file(const char* path);

// Parameters with pointers to recorded memory turned into pointers to this one. Aligned words that
// lie in a region are taken for pointers.
void relocate(File& file);

void write_memory(const File& file, const char* path);

}  // namespace replay
