// The whole pool on the fake driver, with a fault at every driver call in turn: what requests own, including their
// tokens, is unchanged, the accounts add up, and a retry succeeds. Built with KVPAGE_TEST_FAKE_DRIVER.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "tests/expect_ok.h"
#include "tests/pool_util.h"

namespace kvpage::testing {
namespace {

using cu::Result;

constexpr std::int64_t kBlocks = 64;

// Two requests with tokens and a parked slot, in a pool of four ranges per slot that fills new memory. `blocks` is the
// size of the pool: 64 leave room, 32 do not.
struct World {
  explicit World(std::int64_t blocks = kBlocks)
      : pool(MakePool(SmallGeometry(Layout::kPerLayer), blocks, {false, /*poison=*/true})), program(pool.get()) {
    first = program.Acquire(20);
    second = program.Acquire(35);
    const std::int32_t third = program.Acquire(40);
    for (const std::int32_t slot : {first, second}) {
      EXPECT_OK(program.Write(slot, 18));
      for (int token = 0; token < 18; ++token) {
        std::memset(pool->View().At(slot, token, 1, token % 2, 0), 10 * slot + token, 64 * sizeof(float));
      }
    }
    program.Release(third);
  }

  // Returns the data that requests can see, after checking that the accounts add up.
  std::vector<std::int64_t> State() {
    const PoolNumbers n = pool->Numbers();
    std::vector<std::int64_t> state = {n.blocks_total,   n.blocks_mapped,   n.blocks_parked + n.blocks_free,
                                       n.slots_occupied, n.blocks_draining, n.slots_draining};
    EXPECT_EQ(n.blocks_mapped + n.blocks_parked + n.blocks_free + n.blocks_draining, n.blocks_total);
    EXPECT_EQ(Fake().Report().mappings, n.blocks_mapped + n.blocks_parked + n.blocks_draining) << "leftovers";
    for (const SlotRow& row : pool->Rows()) {
      state.insert(state.end(), {row.slot, static_cast<std::int64_t>(row.state), row.blocks, row.reserved,
                                 row.committed, row.length});
      std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>> map;
      EXPECT_OK(pool->BlockMap(row.slot, &map));
      for (const auto& range : map) {
        for (const auto& [block, references] : range) state.insert(state.end(), {block, references});
      }
      for (int token = 0; token < std::min<std::int64_t>(row.length, 18); ++token) {
        state.push_back(*pool->View().At(row.slot, token, 1, token % 2, 3));
      }
    }
    return state;
  }

  std::shared_ptr<Pool> pool;
  Program program;
  std::int32_t first = -1, second = -1;
};

// Writes a slot to its end and frees it: no mapping may be missing that the pool believes in.
void UseItAll(World* world, std::int32_t slot) {
  const std::int64_t room = world->pool->Numbers().blocks_free + world->pool->Numbers().blocks_parked;
  const Claim claim = world->pool->Extend({slot}, {128});
  EXPECT_TRUE(claim.status.ok() || room < 32) << claim.status.message();
  for (const SlotRow& row : world->pool->Rows()) {
    for (std::int64_t token = row.length; token < row.blocks / 4 * 16; ++token) {
      for (int layer = 0; layer < 2; ++layer) {
        for (int kv = 0; kv < 2; ++kv) {
          std::memset(world->pool->View().At(row.slot, token, layer, kv, 0), 1, 64 * sizeof(float));
        }
      }
    }
  }
}

enum Surroundings { kParkedStays, kParkedMayGo, kTrims };

void AtEveryCall(std::int64_t blocks, Surroundings around, const std::function<Status(World*)>& operation) {
  for (const Result code : {Result::kOutOfMemory, Result::kUnknown}) {
    for (std::int64_t n = 1;; ++n) {
      World world(blocks);
      const std::vector<std::int64_t> before = world.State();
      const std::int64_t parked = world.pool->Numbers().blocks_parked;
      const std::int64_t faults = Fake().faults();
      Fake().FailAtAny(n, code);
      const Status status = operation(&world);
      Fake().ClearFaults();
      if (Fake().faults() == faults) {
        EXPECT_OK(status);
        EXPECT_GT(n, 4) << "the operation made " << n - 1 << " calls";
        break;
      }
      if (!status.ok()) {
        EXPECT_EQ(world.State(), before) << "call " << n << " " << status.message();
        EXPECT_TRUE(around != kParkedStays || world.pool->Numbers().blocks_parked == parked) << "call " << n;
        EXPECT_OK(operation(&world)) << "after call " << n;
      } else {
        // Parked memory may have served where new memory was unavailable; trimming may do less.
        EXPECT_TRUE(code == Result::kOutOfMemory || around == kTrims) << "call " << n << " failed and nobody was told";
      }
      UseItAll(&world, world.first);
    }
  }
}

TEST(FakeDriverFaultsTest, Acquire) {
  AtEveryCall(kBlocks, kParkedStays, [](World* world) { return world->pool->Acquire({60, 16}).status; });
}

TEST(FakeDriverFaultsTest, AcquireUnderPressure) {
  // 8 + 12 blocks are in use and 12 parked; 24 are wanted, of 44.
  AtEveryCall(44, kParkedMayGo, [](World* world) { return world->pool->Acquire({16, 80}).status; });
}

TEST(FakeDriverFaultsTest, Extend) {
  AtEveryCall(kBlocks, kParkedStays,
              [](World* world) { return world->pool->Extend({world->first, world->second}, {64, 50}).status; });
}

TEST(FakeDriverFaultsTest, ExtendTakesParkedBlocks) {
  AtEveryCall(32, kParkedMayGo, [](World* world) { return world->pool->Extend({world->second}, {90}).status; });
}

TEST(FakeDriverFaultsTest, Trim) {
  AtEveryCall(kBlocks, kTrims, [](World* world) {
    std::int64_t freed = 0;
    return world->pool->Trim(&freed);
  });
}

TEST(FakeDriverFaultsTest, ResizeDown) {
  AtEveryCall(kBlocks, kTrims, [](World* world) {
    const Claim claim = world->pool->Resize(24 * 4096);
    // Memory may have been freed before the failure, but never owned memory; the capacity changes last.
    return claim.status;
  });
}

TEST(FakeDriverFaultsTest, MapSlots) {
  for (const Result code : {Result::kOutOfMemory, Result::kUnknown}) {
    for (std::int64_t n = 1;; ++n) {
      World world;
      const std::vector<std::int64_t> before = world.State();
      const std::int64_t faults = Fake().faults();
      Fake().FailAtAny(n, code);
      bool ok = true;
      const Status status = world.program.Map(world.first, 70, &ok);
      Fake().ClearFaults();
      if (Fake().faults() == faults) {
        EXPECT_TRUE(status.ok() && ok && n > 4);
        break;
      }
      // Running out of memory is a result; anything else is an error of the program, but the pool stays usable.
      EXPECT_EQ(status.ok(), (code == Result::kOutOfMemory)) << n << " " << status.message();
      // Parked memory may have served where new memory was unavailable.
      EXPECT_TRUE((status.ok() && ok) || world.State() == before) << "call " << n;
      if (!status.ok()) world.program.Restart();
      EXPECT_OK(world.program.Map(world.first, 70, &ok));
      EXPECT_TRUE(ok);
      UseItAll(&world, world.second);
    }
  }
}

TEST(FakeDriverFaultsTest, ParkedMemoryServesWhereTheDeviceHasNoMore) {
  World world;
  Fake().FailAt(cu::Call::kMemCreate, 1, Result::kOutOfMemory, 1000000);
  bool ok = false;
  EXPECT_OK(world.program.Map(world.first, 48, &ok));
  EXPECT_TRUE(ok) << "a block of each range is parked";
  const std::vector<std::int64_t> before = world.State();
  EXPECT_OK(world.program.Map(world.first, 128, &ok));
  EXPECT_FALSE(ok);
  EXPECT_EQ(world.State(), before);
  EXPECT_OK(world.program.Write(world.second, 10));
  world.program.Release(world.second);
  EXPECT_OK(world.program.Map(world.first, 96, &ok));
  EXPECT_TRUE(ok) << "what the other one had is parked now";
  Fake().ClearFaults();
  EXPECT_OK(world.program.Map(world.first, 128, &ok));
  EXPECT_TRUE(ok);
}

TEST(FakeDriverFaultsTest, NothingIsLeftBehindWhateverFails) {
  // Makes a pool and frees everything, with a fault anywhere in between.
  for (std::int64_t n = 1;; ++n) {
    const std::int64_t faults = Fake().faults();
    Fake().FailAtAny(n, Result::kUnknown);
    std::shared_ptr<CudaContext> context;
    if (CudaContext::Make(Fake().driver(), 0, &context).ok()) {
      const Geometry geometry = SmallGeometry();
      std::unique_ptr<CudaVmm> vmm;
      std::shared_ptr<Pool> pool;
      if (CudaVmm::Make(context, geometry.virtual_bytes(), geometry.block_bytes, &vmm).ok() &&
          Pool::Make(geometry, 8 * geometry.block_bytes, {}, std::move(vmm), nullptr, &pool).ok()) {
        static_cast<void>(pool->Acquire({33}));
        static_cast<void>(pool->Acquire({33}));
      }
      Fake().ClearFaults();  // failures during destruction cannot be made up for
    }
    Fake().ClearFaults();
    context.reset();
    FakeDriver::State left = Fake().Report();
    EXPECT_TRUE(left.empty()) << "call " << n << " " << left.ToString();
    if (Fake().faults() == faults) break;
  }
}

}  // namespace
}  // namespace kvpage::testing
