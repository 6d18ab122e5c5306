// Limits of the system: this machine's numbers, and cgroup trees laid out in a temporary folder.
#include "vmm/limits.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

namespace kvpage {
namespace {

// A /proc and a /sys in a temporary folder, removed by the destructor.
class System {
 public:
  System() {
    // mkdtemp replaces the X's.
    std::string name = (std::filesystem::temp_directory_path() / "kvpage-limits-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) std::abort();
    root_ = name;
    Write("/proc/meminfo", "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    800 kB\n");
  }
  ~System() { std::filesystem::remove_all(root_); }
  System(const System&) = delete;
  System& operator=(const System&) = delete;

  void Write(const std::string& path, const std::string& text) const {
    const std::filesystem::path full = root_ + path;
    std::filesystem::create_directories(full.parent_path());
    std::ofstream(full) << text;
  }
  const std::string& root() const { return root_; }

 private:
  std::string root_;
};

constexpr std::int64_t kKiB = 1024;

TEST(LimitsTest, ThisMachineMakesSense) {
  EXPECT_GE(PageBytes(), 4096);
  EXPECT_GT(MaxMapCount(), 0);
  EXPECT_GT(CurrentMapCounts().others, 0);
  EXPECT_GE(CurrentMapCounts().all, CurrentMapCounts().others);
  EXPECT_GT(AvailableBytes(), 0);
  EXPECT_LE(AvailableBytes(), MemoryLimitBytes());
}

TEST(LimitsTest, WithoutCgroupsTheMachineIsTheLimit) {
  const System system;
  EXPECT_EQ(MemoryLimitBytes(system.root()), 1000 * kKiB);
  EXPECT_EQ(AvailableBytes(system.root()), 800 * kKiB);
}

TEST(LimitsTest, ACgroupBelowTheMachineIsTheLimit) {
  const System system;
  system.Write("/proc/self/cgroup", "0::/pod/container\n");
  system.Write("/sys/fs/cgroup/pod/container/memory.max", "409600\n");
  system.Write("/sys/fs/cgroup/pod/container/memory.current", "307200\n");
  system.Write("/sys/fs/cgroup/pod/container/memory.stat", "anon 1\ninactive_file 20480\n");
  EXPECT_EQ(MemoryLimitBytes(system.root()), 400 * kKiB);
  EXPECT_EQ(AvailableBytes(system.root()), 120 * kKiB) << "page cache that reclaim would take counts as available";
}

TEST(LimitsTest, EveryAncestorsLimitHolds) {
  const System system;
  system.Write("/proc/self/cgroup", "0::/pod/container\n");
  system.Write("/sys/fs/cgroup/pod/container/memory.max", "max\n");
  system.Write("/sys/fs/cgroup/pod/container/memory.current", "102400\n");
  system.Write("/sys/fs/cgroup/pod/memory.max", "204800\n");
  system.Write("/sys/fs/cgroup/pod/memory.current", "153600\n");
  EXPECT_EQ(MemoryLimitBytes(system.root()), 200 * kKiB);
  EXPECT_EQ(AvailableBytes(system.root()), 50 * kKiB);
}

TEST(LimitsTest, VersionOneIsReadToo) {
  const System system;
  system.Write("/proc/self/cgroup", "5:cpu,cpuacct:/other\n4:memory:/job\n");
  system.Write("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", "512000\n");
  system.Write("/sys/fs/cgroup/memory/job/memory.usage_in_bytes", "614400\n");
  EXPECT_EQ(MemoryLimitBytes(system.root()), 500 * kKiB);
  EXPECT_EQ(AvailableBytes(system.root()), 0) << "never negative";
}

TEST(LimitsTest, NothingReadableIsUnknown) {
  EXPECT_EQ(MemoryLimitBytes("/no/such/root"), -1);
  EXPECT_EQ(AvailableBytes("/no/such/root"), -1);
}

}  // namespace
}  // namespace kvpage
