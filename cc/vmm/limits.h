// What the system lets this process have: pages, mappings, memory.
#ifndef KVPAGE_VMM_LIMITS_H_
#define KVPAGE_VMM_LIMITS_H_

#include <cstdint>
#include <string>

namespace kvpage {

std::int64_t PageBytes();
// vm.max_map_count, or its default when it cannot be read.
std::int64_t MaxMapCount();
// Mappings that this process has now.
std::int64_t CurrentMapCount();
// Memory that this process could ever have: the smaller of the machine's and of its cgroups' limits. -1: unknown.
// `root` stands in front of /proc and /sys: tests lay out a system of their own there.
std::int64_t MemoryLimitBytes(const std::string& root = "");
// Memory that it could take now without the OOM killer waking, likewise. -1: unknown.
std::int64_t AvailableBytes(const std::string& root = "");

}  // namespace kvpage

#endif  // KVPAGE_VMM_LIMITS_H_
