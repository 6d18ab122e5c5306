#include "vmm/limits.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>

namespace kvpage {
namespace {

constexpr std::int64_t kUnknown = -1;
constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();

// The first number in a file; "max" means no limit; kUnknown if there is no such file.
std::int64_t ReadNumber(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  if (!(file >> word)) return kUnknown;
  if (word == "max") return kUnlimited;
  char* end = nullptr;
  const unsigned long long value = std::strtoull(word.c_str(), &end, 10);
  if (end == word.c_str()) return kUnknown;
  return value > static_cast<unsigned long long>(kUnlimited) ? kUnlimited : static_cast<std::int64_t>(value);
}

std::int64_t MemInfo(const std::string& root, const std::string& key) {
  std::ifstream file(root + "/proc/meminfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind(key + ":", 0) != 0) continue;
    std::istringstream rest(line.substr(key.size() + 1));
    std::int64_t kib = 0;
    if (rest >> kib) return kib * 1024;
  }
  return kUnknown;
}

// Page cache that the kernel reclaims before it kills a process: part of a cgroup's usage, but available.
std::int64_t InactiveFile(const std::string& dir) {
  std::ifstream file(dir + "/memory.stat");
  std::string name;
  std::int64_t value = 0;
  while (file >> name >> value) {
    if (name == "inactive_file" || name == "total_inactive_file") return value;
  }
  return 0;
}

struct CgroupMemory {
  std::int64_t limit = kUnlimited;
  std::int64_t available = kUnlimited;
};

// Goes from this process's memory cgroup up to the root, because the limits of all ancestors apply.
CgroupMemory ReadCgroups(const std::string& root) {
  CgroupMemory result;
  std::ifstream file(root + "/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && controllers.find("memory") == std::string::npos) continue;
    const std::string mount = root + (v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory");
    std::string path = line.substr(second + 1);
    while (true) {
      const std::string dir = mount + (path == "/" ? "" : path);
      const std::int64_t limit = ReadNumber(dir + (v2 ? "/memory.max" : "/memory.limit_in_bytes"));
      if (limit != kUnknown && limit != kUnlimited) {
        const std::int64_t used = ReadNumber(dir + (v2 ? "/memory.current" : "/memory.usage_in_bytes"));
        result.limit = std::min(result.limit, limit);
        if (used != kUnknown) {
          result.available = std::min(result.available, std::max<std::int64_t>(limit - used + InactiveFile(dir), 0));
        }
      }
      if (path.empty() || path == "/") break;
      path.resize(path.find_last_of('/'));
      if (path.empty()) path = "/";
    }
  }
  return result;
}

}  // namespace

std::int64_t PageBytes() {
  static const std::int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

std::int64_t HugePageBytes() {
  static const std::int64_t bytes =
      std::max<std::int64_t>(ReadNumber("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"), 0);
  return bytes;
}

std::int64_t MaxMapCount() {
  const std::int64_t count = ReadNumber("/proc/sys/vm/max_map_count");
  return count == kUnknown ? 65530 : count;
}

MapCounts CurrentMapCounts() {
  std::ifstream file("/proc/self/maps");
  std::string line, end_of_blocks;
  MapCounts counts;
  while (std::getline(file, line)) {
    ++counts.all;
    std::istringstream fields(line);
    std::string addresses, access, offset, device, inode, name;
    fields >> addresses >> access >> offset >> device >> inode >> name;
    const std::size_t dash = addresses.find('-');
    // A hole after blocks is unnamed, private, read-only memory. Constants of compiled programs look the same but are
    // elsewhere.
    const bool hole = access == "r--p" && name.empty() && addresses.substr(0, dash) == end_of_blocks;
    const bool blocks = name == std::string("/memfd:") + kPoolMemory;
    if (!hole && !blocks) ++counts.others;
    end_of_blocks = blocks ? addresses.substr(dash + 1) : "";
  }
  return counts;
}

std::int64_t MemoryLimitBytes(const std::string& root) {
  const std::int64_t machine = MemInfo(root, "MemTotal");
  const std::int64_t cgroup = ReadCgroups(root).limit;
  if (machine == kUnknown) return cgroup == kUnlimited ? kUnknown : cgroup;
  return std::min(machine, cgroup);
}

std::int64_t AvailableBytes(const std::string& root) {
  const std::int64_t machine = MemInfo(root, "MemAvailable");
  const std::int64_t cgroup = ReadCgroups(root).available;
  if (machine == kUnknown) return cgroup == kUnlimited ? kUnknown : cgroup;
  return std::min(machine, cgroup);
}

}  // namespace kvpage
