// Cached prefixes become huge pages if the system has any, and stay unchanged if it refuses.
#include <gtest/gtest.h>

#include <cstdint>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/faulty_vmm.h"
#include "tests/pool_util.h"
#include "tests/sharing_util.h"
#include "vmm/limits.h"

namespace kvpage::testing {
namespace {

using relocation::Report;

constexpr std::int32_t kTokens = 8448;  // a huge page of 512 blocks, and 16 more blocks

// Returns the bytes of pool memory that are mapped by huge pages.
std::int64_t HugeBytes() {
  std::int64_t sum = 0;
  bool ours = false;
  std::ifstream maps("/proc/self/smaps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find('-') < line.find(' ')) ours = line.find("memfd:jax_kvpage") != std::string::npos;
    if (ours && line.rfind("ShmemPmdMapped:", 0) == 0) sum += std::stoll(line.substr(15)) * 1024;
  }
  return sum;
}

class RelocationHugeTest : public ::testing::TestWithParam<Layout> {
 protected:
  // Makes two parked sequences that grew in turns, 64 blocks at a time.
  void Make(std::int64_t max_seq_len, std::int32_t tokens) {
    geometry_ = SmallGeometry(GetParam(), max_seq_len);
    auto faulty = std::make_unique<FaultyVmm>(MakeVmm(geometry_));
    vmm_ = faulty.get();
    pool_ = MakePool(geometry_, 2200 * geometry_.num_ranges(), {}, std::move(faulty));
    program_ = std::make_unique<Program>(pool_.get());
    for (const std::int32_t id : {1, 2}) {
      slots_[id - 1] = program_->AcquirePrefix(std::vector<std::int32_t>(8, id)).slots[0];
    }
    for (std::int32_t done = 0, count; done < tokens; done += count) {
      count = std::min(1024, tokens - done);
      for (const std::int32_t id : {1, 2}) Write(slots_[id - 1], done, count, id);
    }
    for (const std::int32_t slot : slots_) program_->Release(slot);
  }
  void Write(std::int32_t slot, std::int32_t begin, std::int32_t count, std::int32_t id) {
    EXPECT_OK(pool_->Extend({slot}, {begin + count}).status);
    EXPECT_OK(program_->Write(slot, count));
    ForTokens(pool_.get(), slot, begin, begin + count,
              [&](float& at, float token) { at = 1000 * static_cast<float>(id) + token; });
    EXPECT_OK(pool_->Commit(slot, std::vector<std::int32_t>(static_cast<std::size_t>(count), id)));
  }
  Report Relocate() {
    Report report;
    EXPECT_OK(pool_->Relocate({std::int64_t{1} << 40, true, {}, /*huge_pages=*/true}, &report));
    EXPECT_OK(pool_->Audit());
    return report;
  }
  bool Holds(std::int32_t slot, std::int32_t tokens, std::int32_t id) {
    return CountStamped(pool_.get(), slot, 0, tokens, static_cast<float>(id)) == tokens;
  }

  Geometry geometry_;
  FaultyVmm* vmm_ = nullptr;
  std::shared_ptr<Pool> pool_;
  std::unique_ptr<Program> program_;
  std::int32_t slots_[2] = {-1, -1};
};

TEST_P(RelocationHugeTest, AnAliasIsMappedByHugePages) {
  Make(16384, kTokens);
  const Report report = Relocate();
  const std::int64_t ranges = geometry_.num_ranges();
  EXPECT_LT(report.mappings_after, report.mappings_before);
  if (report.huge_refused.empty()) {
    EXPECT_EQ(report.huge_pages, 2 * ranges);
  }
  EXPECT_EQ(report.huge_pages == 0, !report.huge_refused.empty()) << report.huge_refused;
  for (const std::int32_t id : {1, 2}) EXPECT_TRUE(Holds(slots_[id - 1], kTokens, id));
  std::vector<std::int32_t> ids(kTokens + 1, 1);
  ids.back() = 9;
  const std::int32_t slot = program_->AcquirePrefix(ids).slots[0], fork = program_->Fork(slot);
  const std::int64_t before = HugeBytes();
  EXPECT_TRUE(Holds(fork, kTokens, 1));
  if (report.huge_pages > 0) {
    EXPECT_EQ(HugeBytes() - before, ranges * HugePageBytes());
  }
  // They behave like other blocks.
  program_->Truncate(fork, 40);
  Write(fork, 40, 40, 1);
  EXPECT_TRUE(Holds(fork, 80, 1));
  EXPECT_TRUE(Holds(slot, kTokens, 1));
  for (const SlotRow& row : pool_->Rows()) program_->Release(row.slot);
  std::int64_t freed = 0;
  EXPECT_OK(pool_->Evict(std::int64_t{1} << 40, &freed));
  EXPECT_OK(pool_->Trim(&freed));
  EXPECT_EQ(pool_->Numbers().physical_bytes, 0);
}

TEST_P(RelocationHugeTest, ARefusalIsReportedAndChangesNothing) {
  Make(16384, kTokens);
  vmm_->FailAt(Verb::kCollapse, 1);
  const Report report = Relocate();
  if (vmm_->failed()) {
    EXPECT_EQ(report.huge_refused, "injected fault");
    EXPECT_EQ(report.huge_pages, 1);
  }
  EXPECT_FALSE(report.huge_refused.empty());
  EXPECT_LT(report.mappings_after, report.mappings_before);
  for (const std::int32_t id : {1, 2}) EXPECT_TRUE(Holds(slots_[id - 1], kTokens, id));
}

TEST_P(RelocationHugeTest, SlotsThatDisagreeWithTheFile) {
  Make(8192 - 16, 2048);
  const Report report = Relocate();
  EXPECT_EQ(report.huge_pages, 0);
  if (HugePageBytes() == 2 << 20) {
    EXPECT_EQ(report.huge_refused,
              "slots lie 2093056 bytes apart, not a multiple of a huge page of 2097152: choose max_seq_len as a "
              "multiple of 8192 tokens");
  }
  Make(8192, 2048);
  EXPECT_FALSE(Relocate().huge_refused.empty()) << "nothing fills a huge page";
}

INSTANTIATE_TEST_SUITE_P(Layouts, RelocationHugeTest, ::testing::Values(Layout::kFused, Layout::kPerLayer));

}  // namespace
}  // namespace kvpage::testing
