// Helpers for tests of relocation: a pool whose sequences are scattered over its blocks.
#ifndef KVPAGE_TESTS_RELOCATION_UTIL_H_
#define KVPAGE_TESTS_RELOCATION_UTIL_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cache/relocation.h"
#include "tests/expect_ok.h"
#include "tests/faulty_vmm.h"
#include "tests/pool_util.h"
#include "tests/sharing_util.h"

namespace kvpage::testing {

using relocation::Report;

constexpr std::int64_t kEverything = std::int64_t{1} << 30;

inline std::vector<std::int32_t> Ids(std::int64_t count, std::int32_t id) {
  return std::vector<std::int32_t>(static_cast<std::size_t>(count), id);
}

// Two parked sequences of 96 tokens with ids 1 and 2 that grew in turns, so that none of their blocks are adjacent.
class RelocationTest : public ::testing::TestWithParam<Layout> {
 protected:
  void Make(std::int64_t blocks = 24) {
    auto faulty = std::make_unique<FaultyVmm>(MakeVmm(geometry_));
    vmm_ = faulty.get();
    pool_ = MakePool(geometry_, blocks * ranges_, {}, std::move(faulty));
    program_ = std::make_unique<Program>(pool_.get());
    for (const std::int32_t id : {1, 2}) slots_[id - 1] = program_->AcquirePrefix(Ids(8, id)).slots[0];
    for (int i = 0; i < 6; ++i) {
      for (const std::int32_t id : {1, 2}) Write(slots_[id - 1], 16, id);
    }
    for (const std::int32_t slot : slots_) program_->Release(slot);
  }
  void Write(std::int32_t slot, std::int32_t count, std::int32_t id) {
    const std::int32_t length = program_->length(slot);
    EXPECT_OK(pool_->Extend({slot}, {length + count}).status);
    EXPECT_OK(program_->Write(slot, count));
    ForTokens(pool_.get(), slot, length, length + count,
              [&](float& at, float token) { at = 1000 * static_cast<float>(id) + token; });
    EXPECT_OK(pool_->Commit(slot, Ids(count, id)));
  }
  Status Relocate(Report* report = nullptr, std::vector<std::int32_t> slots = {}, std::int64_t bytes = kEverything) {
    Report unused;
    const bool everything = slots.empty();
    return pool_->Relocate({bytes, everything, std::move(slots), huge_pages_}, report != nullptr ? report : &unused);
  }
  std::int64_t Found(std::int32_t id) {
    std::int64_t tokens = 0;
    EXPECT_OK(pool_->FindPrefix("", Ids(96, id), /*whole=*/true, &tokens));
    return tokens;
  }
  // Returns the slot that a request for a complete sequence gets, after checking its tokens.
  std::int32_t Borrow(std::int32_t id) {
    std::vector<std::int32_t> ids = Ids(97, id);
    ids.back() = 9;
    const Claim claim = program_->AcquirePrefix(ids);
    EXPECT_EQ(claim.tokens[0], 96);
    EXPECT_TRUE(Holds(claim.slots[0], 96, id));
    return claim.slots[0];
  }
  bool Holds(std::int32_t slot, std::int64_t tokens, std::int32_t id) {
    return CountStamped(pool_.get(), slot, 0, tokens, static_cast<float>(id)) == tokens;
  }
  bool Sound() {
    EXPECT_OK(pool_->Audit());
    const PoolNumbers n = pool_->Numbers();
    EXPECT_LE(n.physical_bytes, n.blocks_total * n.block_bytes);
    return AddsUp(pool_.get());
  }
  void Finish() {
    vmm_->FailAt(Verb::kNone, 0);
    for (const SlotRow& row : pool_->Rows()) program_->Release(row.slot);
    std::int64_t freed = 0;
    EXPECT_OK(pool_->Evict(kEverything, &freed));
    EXPECT_OK(pool_->Trim(&freed));
    const PoolNumbers n = pool_->Numbers();
    EXPECT_EQ(n.blocks_free, n.blocks_total);
    EXPECT_EQ(n.blocks_cached, 0);
    EXPECT_EQ(n.physical_bytes, 0);
  }

  const Geometry geometry_ = SmallGeometry(GetParam());
  const std::int64_t ranges_ = geometry_.num_ranges();
  bool huge_pages_ = false;
  FaultyVmm* vmm_ = nullptr;
  std::shared_ptr<Pool> pool_;
  std::unique_ptr<Program> program_;
  std::int32_t slots_[2] = {-1, -1};
};

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_RELOCATION_UTIL_H_
