// A pool on a page table and a disk that can fail, whose sequences are swapped.
#ifndef KVPAGE_TESTS_SWAPPING_UTIL_H_
#define KVPAGE_TESTS_SWAPPING_UTIL_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/faulty_io.h"
#include "tests/faulty_vmm.h"
#include "tests/pool_util.h"
#include "tests/sharing_util.h"
#include "tests/store_util.h"

namespace kvpage::testing {

using store::testing::Soon;

class SwappingTest : public ::testing::TestWithParam<Layout> {
 protected:
  SwappingTest() : geometry_(SmallGeometry(GetParam())) {
    auto faulty = std::make_unique<FaultyVmm>(MakeVmm(geometry_));
    vmm_ = faulty.get();
    pool_ = MakePool(geometry_, 24 * ranges(), {}, std::move(faulty));
    program_ = std::make_unique<Program>(pool_.get());
    store::StoreOptions options;
    options.io = io_;
    store_ = store::testing::OpenStore(folder_, options);
  }
  ~SwappingTest() override {
    io_->hold_reads = io_->hold_writes = false;
    pool_->Close();
  }

  std::int64_t ranges() const { return geometry_.num_ranges(); }
  std::int32_t Begin(std::int32_t tokens, float stamp) {
    const std::int32_t slot = program_->Acquire(tokens);
    WriteStamped(pool_.get(), program_.get(), slot, tokens, stamp);
    return slot;
  }
  SwapPtr StartOut(std::int32_t slot) {
    SwapPtr swap;
    EXPECT_OK(pool_->SwapOut(slot, store_, &swap));
    return swap;
  }
  SwapPtr Out(std::int32_t slot) {
    SwapPtr swap = StartOut(slot);
    EXPECT_OK(program_->Vacate(slot));
    return swap;
  }
  SwapPtr OutToDisk(std::int32_t slot) {
    SwapPtr swap = Out(slot);
    EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kStored; }));
    return swap;
  }
  std::int32_t In(const SwapPtr& swap) {
    const Claim claim = pool_->SwapIn(swap);
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    EXPECT_OK(RunIn(claim));
    return claim.slots[0];
  }
  Status RunIn(const Claim& claim) {
    const auto tokens = static_cast<std::int32_t>(claim.tokens[0]);
    std::vector<std::int32_t> lengths(kSlots);
    std::uint32_t epoch = 0;
    Status status =
        EditOne(pool_.get(), "swap_in", program_->cache(),
                {static_cast<std::int32_t>(SlotOpcode::kSwapIn), claim.slots[0], tokens}, &epoch, lengths.data());
    if (status.ok()) program_->Set(epoch, std::move(lengths));
    return status;
  }
  bool AllRight() { return AddsUp(pool_.get()) && pool_->Audit().ok(); }
  // Returns whether nothing of any swapped sequence is left anywhere.
  bool NothingLeft() {
    const PoolNumbers n = pool_->Numbers();
    return n.sequences_swapped == 0 && n.blocks_swapped == 0 && store_->Numbers().bytes_swapped == 0 && AllRight();
  }

  const Geometry geometry_;
  const store::testing::TemporaryFolder folder_;
  const std::shared_ptr<store::testing::FaultyIo> io_ = std::make_shared<store::testing::FaultyIo>();
  std::shared_ptr<store::BlockStore> store_;
  FaultyVmm* vmm_ = nullptr;
  std::shared_ptr<Pool> pool_;
  std::unique_ptr<Program> program_;
};

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_SWAPPING_UTIL_H_
