// System limits of this process: pages, mappings, memory.
#ifndef KVPAGE_VMM_LIMITS_H_
#define KVPAGE_VMM_LIMITS_H_

#include <cstdint>
#include <string>

namespace kvpage {

std::int64_t PageBytes();
// Size of a transparent huge page; 0 if the system has none.
std::int64_t HugePageBytes();
// vm.max_map_count, or its default if it cannot be read.
std::int64_t MaxMapCount();
// The current mappings of this process: all of them, and those that are neither blocks of a pool (whose memory is named
// kPoolMemory) nor holes after them.
struct MapCounts {
  std::int64_t all = 0;
  std::int64_t others = 0;
};
inline constexpr char kPoolMemory[] = "jax_kvpage";
MapCounts CurrentMapCounts();
// The maximum memory of this process: the smaller of the machine's memory and its cgroups' limits; -1 if unknown.
// `root` is a prefix for /proc and /sys, for tests.
std::int64_t MemoryLimitBytes(const std::string& root = "");
// Memory that it can allocate now without triggering the OOM killer; -1 if unknown.
std::int64_t AvailableBytes(const std::string& root = "");

}  // namespace kvpage

#endif  // KVPAGE_VMM_LIMITS_H_
