// A page table that fails on demand: after every failure midway the pool is unchanged.
#include <gtest/gtest.h>

#include <cstring>
#include <utility>

#include "tests/expect_ok.h"
#include "tests/faulty_vmm.h"
#include "tests/pool_util.h"

namespace kvpage::testing {
namespace {

struct Fixture {
  explicit Fixture(std::int64_t blocks) : geometry(SmallGeometry(Layout::kPerLayer)) {
    auto faulty = std::make_unique<FaultyVmm>(MakeVmm(geometry));
    vmm = faulty.get();
    pool = MakePool(geometry, blocks, {}, std::move(faulty));
  }
  Geometry geometry;
  FaultyVmm* vmm = nullptr;
  std::shared_ptr<Pool> pool;
};

bool Same(const PoolNumbers& a, const PoolNumbers& b) {
  return a.blocks_mapped == b.blocks_mapped && a.blocks_free + a.blocks_parked == b.blocks_free + b.blocks_parked &&
         a.blocks_draining == b.blocks_draining && a.slots_occupied == b.slots_occupied;
}

TEST(PoolFaultsTest, AcquireRollsBackWhereverItFails) {
  for (Verb verb : {Verb::kCreate, Verb::kMap}) {
    for (int call = 0; call < 8; ++call) {
      Fixture f(64);
      Program program(f.pool.get());
      const std::int32_t slot = program.Acquire(20);
      EXPECT_OK(program.Write(slot, 20));
      const PoolNumbers before = f.pool->Numbers();
      f.vmm->FailAt(verb, call);
      const Claim claim = f.pool->Acquire({40, 20});
      if (!f.vmm->failed()) continue;
      EXPECT_EQ(claim.status.code(), Code::kResourceExhausted);
      EXPECT_TRUE(Same(f.pool->Numbers(), before)) << "verb " << static_cast<int>(verb) << " call " << call;
      EXPECT_OK(program.Write(slot, 1));
      f.vmm->FailAt(Verb::kNone, 0);
      EXPECT_OK(f.pool->Acquire({40, 20}).status);
    }
  }
}

TEST(PoolFaultsTest, MapSlotsAnswersFalseAndGoesOn) {
  for (int call = 0; call < 4; ++call) {
    Fixture f(64);
    Program program(f.pool.get());
    const std::int32_t slot = program.Acquire(16);
    EXPECT_OK(program.Write(slot, 16));
    f.vmm->FailAt(Verb::kMap, call);
    bool ok = true;
    EXPECT_OK(program.Map(slot, 17, &ok));
    EXPECT_FALSE(ok);
    EXPECT_OK(program.Map(slot, 17, &ok));
    EXPECT_TRUE(ok);
    EXPECT_OK(program.Write(slot, 1));
    EXPECT_EQ(program.length(slot), 17);
  }
}

TEST(PoolFaultsTest, StealingThatFailsLosesNothing) {
  for (int call = 0;; ++call) {
    Fixture f(16);
    Program program(f.pool.get());
    const std::int32_t first = program.Acquire(32);
    const std::int32_t second = program.Acquire(32);
    EXPECT_OK(program.Write(second, 32));
    const KVView view = f.pool->View();
    const float marks[] = {1.5f, 2.5f};
    for (int i = 0; i < 2; ++i) std::memcpy(view.At(second, i * 16, 1, i, 0), &marks[i], sizeof(float));
    program.Release(first);
    f.vmm->FailAt(Verb::kMove, call);
    // Two slots of 4 blocks are wanted and 8 are parked in one slot: it is adopted and its surplus is moved.
    const Claim claim = f.pool->Acquire({16, 16});
    const PoolNumbers numbers = f.pool->Numbers();
    EXPECT_EQ(numbers.blocks_mapped + numbers.blocks_parked + numbers.blocks_free, 16) << claim.status.message();
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(std::memcmp(view.At(second, i * 16, 1, i, 0), &marks[i], sizeof(float)), 0)
          << "the live request's data";
    }
    if (!f.vmm->failed()) {
      EXPECT_OK(claim.status);
      EXPECT_EQ(numbers.blocks_mapped, 16);
      EXPECT_EQ(call, 4) << call << " moves: one for each range";
      break;
    }
    EXPECT_FALSE(claim.status.ok());
    EXPECT_EQ(numbers.slots_occupied, 1);
    f.vmm->FailAt(Verb::kNone, 0);
    EXPECT_OK(f.pool->Acquire({16, 16}).status);
    std::int64_t freed = 0;
    EXPECT_OK(f.pool->Trim(&freed));
  }
}

TEST(PoolFaultsTest, ShrinkingThatFailsLosesNothing) {
  for (int call = 0; call < 4; ++call) {
    Fixture f(16);
    Program program(f.pool.get());
    program.Release(program.Acquire(32));
    f.vmm->FailAt(Verb::kUnmap, call);
    std::int64_t freed = 0;
    EXPECT_FALSE(f.pool->Trim(&freed).ok());
    EXPECT_TRUE(f.vmm->failed());
    const PoolNumbers numbers = f.pool->Numbers();
    EXPECT_EQ(numbers.blocks_parked, 8);
    EXPECT_OK(f.pool->Trim(&freed));
    EXPECT_EQ(f.pool->Numbers().blocks_free, 16);
  }
}

TEST(PoolFaultsTest, TrimThatFailsKeepsItsAccounts) {
  Fixture f(16);
  Program program(f.pool.get());
  program.Release(program.Acquire(64));
  f.vmm->FailAt(Verb::kDestroy, 0);
  std::int64_t freed = 0;
  EXPECT_OK(f.pool->Trim(&freed));
  EXPECT_EQ(f.pool->Numbers().blocks_free, 16);
  const std::int32_t slot = program.Acquire(64);
  EXPECT_OK(program.Write(slot, 64));
}

}  // namespace
}  // namespace kvpage::testing
