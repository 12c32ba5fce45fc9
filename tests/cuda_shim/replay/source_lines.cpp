#include "source_lines.h"

#include <unistd.h>

#include <climits>
#include <cstdio>
#include <cstring>

namespace permattn_shim {
namespace {

std::string own_path() {
  char path[PATH_MAX] = {};
  const ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
  return length < 0 ? std::string() : std::string(path, static_cast<size_t>(length));
}

// Lines of all functions that were put into each other at an address, the innermost first.
std::vector<std::string> lines_of(const std::vector<uintptr_t>& addresses) {
  std::string command = "addr2line -i -e '" + own_path() + "'";
  for (const uintptr_t address : addresses) {
    char text[32];
    // Of a call, the address behind it is known.
    std::snprintf(text, sizeof(text), " 0x%lx", static_cast<unsigned long>(address - 1));
    command += text;
  }
  std::vector<std::string> lines;
  std::FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (pipe == nullptr) return lines;
  char line[4096];
  while (std::fgets(line, sizeof(line), pipe) != nullptr) {
    std::string text(line);
    text = text.substr(0, text.find_first_of(" \n"));
    lines.push_back(text);
  }
  pclose(pipe);
  return lines;
}

// Headers of the stand-in lie in the folder cuda_shim itself, those of the language in /usr.
bool is_kernel(const std::string& line) {
  if (line.rfind("/usr/", 0) == 0 || line.rfind("??", 0) == 0) return false;
  const std::string folder = line.substr(0, line.find_last_of('/') + 1);
  const std::string own = "/cuda_shim/";
  return folder.size() < own.size() || folder.substr(folder.size() - own.size()) != own;
}

// Behind the root of the repository.
std::string shortened(const std::string& line) {
  for (const char* top : {"/csrc/", "/tests/"}) {
    const size_t at = line.rfind(top);
    if (at != std::string::npos) return line.substr(at + 1);
  }
  return line;
}

}  // namespace

std::string source_line(const std::vector<uintptr_t>& addresses) {
  const std::vector<std::string> lines = lines_of(addresses);
  for (const std::string& line : lines) {
    if (is_kernel(line)) return shortened(line);
  }
  char text[32];
  std::snprintf(text, sizeof(text), "0x%lx", static_cast<unsigned long>(addresses.at(0)));
  return lines.empty() ? text : shortened(lines[0]);
}

}  // namespace permattn_shim
