// Forks and truncations with a page table that fails at every call in turn: nothing is lost, the accounts add up, and a
// retry succeeds.
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/faulty_vmm.h"
#include "tests/pool_util.h"
#include "tests/sharing_util.h"

namespace kvpage::testing {
namespace {

// A donor of 40 committed tokens with a fork, and two free slots with parked blocks.
struct Fixture {
  Fixture() : geometry(SmallGeometry(Layout::kPerLayer)) {
    auto faulty = std::make_unique<FaultyVmm>(MakeVmm(geometry));
    vmm = faulty.get();
    pool = MakePool(geometry, 24 * geometry.num_ranges(), {}, std::move(faulty));
    program = std::make_unique<Program>(pool.get());
    donor = program->Acquire(40);
    WriteStamped(pool.get(), program.get(), donor, 40, 1);
    fork = program->Fork(donor);
    const std::int32_t parked[] = {program->Acquire(16), program->Acquire(32)};
    for (const std::int32_t slot : parked) program->Release(slot);
  }
  bool Intact() {
    return CountStamped(pool.get(), donor, 0, 40, 1) == 40 && CountStamped(pool.get(), fork, 0, 40, 1) == 40;
  }
  std::int64_t free_or_parked() {
    const PoolNumbers n = pool->Numbers();
    return n.blocks_free + n.blocks_parked;
  }
  // The number of blocks that the donor and its fork map.
  std::int64_t in_maps() {
    std::set<std::int32_t> blocks;
    for (const std::int32_t slot : {donor, fork}) {
      BlockReferences map;
      EXPECT_OK(pool->BlockMap(slot, &map));
      for (const auto& range : map) {
        for (const auto& [block, references] : range) blocks.insert(block);
      }
    }
    return static_cast<std::int64_t>(blocks.size());
  }
  // Releases everything, after which the pool must be like new.
  void Finish() {
    vmm->FailAt(Verb::kNone, 0);
    for (const SlotRow& row : pool->Rows()) program->Release(row.slot);
    std::int64_t freed = 0;
    EXPECT_OK(pool->Trim(&freed));
    const PoolNumbers n = pool->Numbers();
    EXPECT_EQ(n.blocks_free, n.blocks_total);
    EXPECT_EQ(n.blocks_shared, 0);
    EXPECT_EQ(n.physical_bytes, 0);
  }

  const Geometry geometry;
  FaultyVmm* vmm = nullptr;
  std::shared_ptr<Pool> pool;
  std::unique_ptr<Program> program;
  std::int32_t donor = -1, fork = -1;
};

std::string At(Verb verb, int call) {
  return "verb " + std::to_string(static_cast<int>(verb)) + ", call " + std::to_string(call);
}

constexpr int kMostCalls = 64;

TEST(SharingFaultsTest, AForkThatFailsChangesNothing) {
  for (const Verb verb : {Verb::kMapReadOnly, Verb::kCreate, Verb::kMap, Verb::kUnmap}) {
    int call = 0;
    for (bool failed = true; failed; ++call) {
      ASSERT_LT(call, kMostCalls) << At(verb, call);
      Fixture f;
      std::int64_t freed = 0;
      if (verb == Verb::kCreate) {
        EXPECT_OK(f.pool->Trim(&freed));
      }
      const std::int64_t left = f.free_or_parked();
      f.vmm->FailAt(verb, call);
      const Claim claim = f.pool->Fork("fork", {{f.donor, -1}, {f.fork, 36}}, {});
      failed = f.vmm->failed();
      f.vmm->FailAt(Verb::kNone, 0);
      EXPECT_TRUE(f.Intact()) << At(verb, call);
      EXPECT_TRUE(AddsUp(f.pool.get())) << At(verb, call);
      if (!failed) {
        EXPECT_OK(claim.status);
        EXPECT_OK(f.program->RunFork(claim.slots[0], f.donor, 40));
        EXPECT_OK(f.program->RunFork(claim.slots[1], f.fork, 36));
      } else {
        EXPECT_FALSE(claim.status.ok()) << At(verb, call);
        EXPECT_EQ(f.pool->Numbers().slots_occupied, 2) << At(verb, call);
        EXPECT_EQ(f.free_or_parked(), left) << At(verb, call);
        EXPECT_EQ(CountStamped(f.pool.get(), f.program->Fork(f.donor), 0, 40, 1), 40) << At(verb, call);
        WriteStamped(f.pool.get(), f.program.get(), f.donor, 20, 2);
        EXPECT_EQ(CountStamped(f.pool.get(), f.donor, 40, 60, 2), 20);
      }
      f.Finish();
    }
    EXPECT_GT(call, 1) << "no call of this verb, " << At(verb, call);
  }
}

TEST(SharingFaultsTest, ATruncationThatFailsCanBeRepeated) {
  for (const bool of_donor : {false, true}) {
    for (const Verb verb : {Verb::kCreate, Verb::kCopy, Verb::kRemap}) {
      int call = 0;
      for (bool failed = true; failed; ++call) {
        ASSERT_LT(call, kMostCalls) << At(verb, call);
        Fixture f;
        const std::int32_t cut = of_donor ? f.donor : f.fork, other = of_donor ? f.fork : f.donor;
        std::int64_t freed = 0;
        EXPECT_OK(f.pool->Trim(&freed));
        const std::int64_t left = f.free_or_parked();
        f.vmm->FailAt(verb, call);
        const Claim claim = f.pool->Truncate({cut}, {5});
        if (claim.status.ok()) {
          const Status status = f.program->RunTruncate(cut, 5);
          EXPECT_EQ(status.ok(), !f.vmm->failed()) << At(verb, call) << status.message();
        } else {
          EXPECT_EQ(verb, Verb::kCreate);
          EXPECT_EQ(f.free_or_parked(), left);
          EXPECT_EQ(f.pool->Committed(cut).size(), std::size_t{40});
        }
        failed = f.vmm->failed();
        f.vmm->FailAt(Verb::kNone, 0);
        EXPECT_EQ(CountStamped(f.pool.get(), other, 0, 40, 1), 40) << At(verb, call);
        EXPECT_EQ(CountStamped(f.pool.get(), cut, 0, 5, 1), 5) << At(verb, call);
        EXPECT_TRUE(AddsUp(f.pool.get())) << At(verb, call);
        if (failed) {
          f.program->Restart();
          EXPECT_EQ(f.pool->Numbers().blocks_mapped, f.in_maps()) << "nothing stays set aside, " << At(verb, call);
          f.program->Truncate(cut, 5);
        }
        EXPECT_EQ(f.pool->Numbers().blocks_shared, 0) << At(verb, call);
        WriteStamped(f.pool.get(), f.program.get(), cut, 40, 2);
        EXPECT_EQ(CountStamped(f.pool.get(), cut, 0, 5, 1), 5) << At(verb, call);
        EXPECT_EQ(CountStamped(f.pool.get(), other, 0, 40, 1), 40) << At(verb, call);
        f.Finish();
      }
      EXPECT_GT(call, 1) << "no call of this verb, " << At(verb, call);
    }
  }
}

// A parked borrower that cannot be emptied must not be handed out for writing.
TEST(SharingFaultsTest, ABorrowerThatCannotBeEmptied) {
  for (int call = 0; call < 8; ++call) {
    Fixture f;
    f.program->Release(f.fork);
    f.vmm->FailAt(Verb::kUnmap, call);
    const Claim claim = f.pool->Acquire({48, 48});
    f.vmm->FailAt(Verb::kNone, 0);
    EXPECT_EQ(CountStamped(f.pool.get(), f.donor, 0, 40, 1), 40) << call;
    EXPECT_TRUE(AddsUp(f.pool.get())) << call;
    if (claim.status.ok()) {
      for (const std::int32_t slot : claim.slots) {
        EXPECT_OK(f.program->Occupy(slot));
        WriteStamped(f.pool.get(), f.program.get(), slot, 48, static_cast<float>(slot + 2));
      }
    }
    EXPECT_EQ(CountStamped(f.pool.get(), f.donor, 0, 40, 1), 40) << call;
    f.Finish();
  }
}

// Both while a fork empties the slot that it takes, and while it maps blocks there.
TEST(SharingFaultsTest, AnotherThreadReleasesTheDonorInsideFork) {
  for (const Verb during : {Verb::kUnmap, Verb::kMapReadOnly}) {
    for (const bool fork_runs_first : {false, true}) {
      Fixture f;
      bool released = false;
      f.vmm->Before(during, [&] {
        std::thread([&] { EXPECT_OK(StartRelease(*f.pool, {f.donor})); }).join();
        released = true;
      });
      const Claim claim = f.pool->Fork("fork", {{f.donor, -1}}, {});
      ASSERT_TRUE(released);
      if (during == Verb::kUnmap) {
        EXPECT_EQ(claim.status.code(), Code::kFailedPrecondition);
        EXPECT_TRUE(Mentions(claim.status, "draining: it was released")) << claim.status.message();
        EXPECT_EQ(f.pool->Numbers().slots_occupied, 1);
        EXPECT_OK(f.program->Vacate(f.donor));
      } else {
        EXPECT_OK(claim.status);
        ASSERT_FALSE(claim.slots.empty());
        const std::int32_t fork = claim.slots[0];
        if (fork_runs_first) {
          EXPECT_OK(f.program->RunFork(fork, f.donor, 40));
          EXPECT_OK(f.program->Vacate(f.donor));
          EXPECT_EQ(CountStamped(f.pool.get(), fork, 0, 40, 1), 40);
        } else {
          EXPECT_OK(f.program->Vacate(f.donor));
          EXPECT_TRUE(Mentions(f.program->RunFork(fork, f.donor, 40), "free"));
          f.program->Restart();
        }
      }
      EXPECT_EQ(CountStamped(f.pool.get(), f.fork, 0, 40, 1), 40);
      EXPECT_TRUE(AddsUp(f.pool.get()));
      f.Finish();
    }
  }
}

}  // namespace
}  // namespace kvpage::testing
