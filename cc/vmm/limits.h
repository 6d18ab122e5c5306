// System limits of this process: pages, mappings, memory.
#ifndef KVPAGE_VMM_LIMITS_H_
#define KVPAGE_VMM_LIMITS_H_

#include <cstdint>
#include <string>

namespace kvpage {

std::int64_t PageBytes();
// Of a transparent huge page; 0: the system has none.
std::int64_t HugePageBytes();
// vm.max_map_count, or its default when it cannot be read.
std::int64_t MaxMapCount();
// Mappings that this process has now: all of them, and those that are neither blocks of a pool (its memory is named
// kPoolMemory) nor holes behind them.
struct MapCounts {
  std::int64_t all = 0;
  std::int64_t others = 0;
};
inline constexpr char kPoolMemory[] = "jax_kvpage";
MapCounts CurrentMapCounts();
// The most memory that this process can have: the smaller of the machine's memory and its cgroups' limits. -1: unknown.
// `root` is a prefix of /proc and /sys, for tests.
std::int64_t MemoryLimitBytes(const std::string& root = "");
// Memory that it can allocate now without waking the OOM killer. -1: unknown.
std::int64_t AvailableBytes(const std::string& root = "");

}  // namespace kvpage

#endif  // KVPAGE_VMM_LIMITS_H_
