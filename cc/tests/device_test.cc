// Pools with a mirror on the fake driver: programs find the host's decisions in the table, and the host learns from it
// what programs did.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/device_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {

TEST(DeviceTest, TableSaysThatThePoolIsInDebugMode) {
  Machine machine;
  PoolOptions options;
  options.debug = true;
  const std::shared_ptr<Pool> pool = machine.MakePool(7, 16, 0, options);
  ASSERT_NE(machine.Find(7), nullptr);
  EXPECT_EQ(machine.Find(7)->debug, 1);
  EXPECT_EQ(machine.Find(7)->allow_stale, 0);
}

TEST(DeviceTest, TableSaysWhatTheHostDecided) {
  Machine machine;
  PoolOptions options;
  options.allow_stale = true;
  const std::shared_ptr<Pool> pool = machine.MakePool(7, 16, 0, options);
  const DevicePool* entry = machine.Find(7);
  EXPECT_NE(entry, nullptr);
  if (entry == nullptr) return;
  EXPECT_EQ(entry->open, 1);
  EXPECT_EQ(entry->allow_stale, 1);
  EXPECT_EQ(entry->debug, 0);
  EXPECT_EQ(entry->view.base, pool->View().base);
  EXPECT_EQ(entry->view.slot_stride, pool->View().slot_stride);
  for (int i = 0; i < 8; ++i) EXPECT_EQ(entry->spec[i], pool->geometry().spec()[i]);
  DeviceProgram program(&machine, 7);
  program.Restart(pool.get());
  EXPECT_EQ(entry->generation, 1);
  EXPECT_EQ(entry->epoch, program.epoch());

  // Room is published before a program can ask for it, in full blocks and never beyond max_seq_len.
  const std::int32_t a = Acquire(pool.get(), &program, 20);
  EXPECT_EQ(entry->slots[a].room, 32);
  const std::int32_t b = Acquire(pool.get(), &program, 0);
  EXPECT_EQ(entry->slots[b].room, 0);
  EXPECT_OK(pool->Extend({a, b}, {33, 1}).status);
  EXPECT_EQ(entry->slots[a].room, 48);
  EXPECT_EQ(entry->slots[b].room, 16);
  EXPECT_OK(pool->Extend({a, b}, {10, 128}).status);  // not lowered while the slot is occupied
  EXPECT_EQ(entry->slots[a].room, 48);
  EXPECT_EQ(entry->slots[b].room, 128);
  program.Write(a, 48);
  EXPECT_EQ(program.length(a), 48);
  EXPECT_OK(pool->TakeFault());
  program.Write(a, 1);
  EXPECT_EQ(pool->TakeFault().message(),
            "append_kv: slot " + std::to_string(a) +
                ": 49 tokens wanted, 48 mapped: map_slots in the program or pool.extend before it makes room");
}

TEST(DeviceTest, ForksHaveRoomAndAFailedTransferUndoesThem) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(7, 32);
  const DevicePool* entry = machine.Find(7);
  ASSERT_NE(entry, nullptr);
  DeviceProgram program(&machine, 7);
  program.Restart(pool.get());
  const std::int32_t donor = Acquire(pool.get(), &program, 48);
  program.Write(donor, 40);
  EXPECT_OK(pool->Commit(donor, std::vector<std::int32_t>(40, 7)));
  const Claim claim = pool->Fork("fork", {{donor, 36}}, {});
  EXPECT_OK(claim.status);
  const std::int32_t fork = claim.slots[0];
  EXPECT_EQ(entry->slots[fork].room, 48);
  EXPECT_EQ(entry->slots[donor].shared, 0) << "programs that are queued may still write";

  // Fail the third copy: the first two publish what the fork shares, whose loss only costs speed.
  machine.fake().FailAt(cu::Call::kMemcpyHtoDAsync, 3, cu::Result::kUnknown);
  EXPECT_FALSE(pool->Fork("fork", {{donor, 40}}, {}).status.ok());
  machine.fake().ClearFaults();
  EXPECT_EQ(pool->Numbers().slots_occupied, 2);
  EXPECT_EQ(pool->Numbers().blocks_shared, 2 * pool->geometry().num_ranges());

  // The fork's programs never run: its slot is free in the next generation.
  program.Restart(pool.get());
  EXPECT_EQ(program.length(fork), -1);
  EXPECT_EQ(pool->Numbers().slots_occupied, 1);
  EXPECT_OK(pool->Truncate({donor}, {0}).status);
  EXPECT_EQ(pool->Numbers().blocks_shared, 0);
}

TEST(DeviceTest, CallsThatChangeNothingOnTheDeviceAskNothingOfTheDriver) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 100);
  const std::int64_t before = machine.fake().total_calls();
  for (int token = 1; token <= 100; ++token) EXPECT_OK(pool->Extend({slot}, {token}).status);
  EXPECT_OK(pool->Commit(slot, std::vector<std::int32_t>(100, 7)));
  EXPECT_OK(pool->TakeFault());
  EXPECT_EQ(pool->Numbers().slots_occupied, 1);
  EXPECT_OK(StartRelease(*pool, {slot}));
  EXPECT_EQ(machine.fake().total_calls(), before);
  program.Release(slot);
}

TEST(DeviceTest, DrainingEndsWhenTheReleaseHasRun) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 8);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 128);
  machine.fake().HoldStream(machine.stream());
  program.Write(slot, 5);
  Release(pool.get(), &program, slot);
  EXPECT_EQ(pool->Numbers().slots_draining, 1);
  Claim claim = pool->Acquire({1});
  EXPECT_EQ(static_cast<int>(claim.status.code()), static_cast<int>(Code::kResourceExhausted));
  EXPECT_EQ(claim.draining, 8);
  EXPECT_FALSE(pool->WaitForDrain(0.002));

  std::atomic<bool> drained{false};
  std::thread waiter([&] {
    EXPECT_TRUE(pool->WaitForDrain(30));
    drained = true;
  });
  Pause();
  EXPECT_FALSE(drained);
  EXPECT_OK(pool->Commit(Acquire(pool.get(), &program, 0), {}));  // no lock is held meanwhile
  machine.fake().ReleaseStream(machine.stream());
  waiter.join();
  EXPECT_EQ(pool->Numbers().slots_draining, 0);
  EXPECT_EQ(pool->Rows().size(), std::size_t{1});

  // The release by the next owner is waited for again.
  const std::int32_t next = Acquire(pool.get(), &program, 128);
  EXPECT_EQ(next, slot);
  machine.fake().HoldStream(machine.stream());
  Release(pool.get(), &program, next);
  EXPECT_EQ(pool->Numbers().slots_draining, 1);
  machine.fake().ReleaseStream(machine.stream());
  EXPECT_EQ(pool->Numbers().slots_draining, 0);
  EXPECT_FALSE(pool->WaitForDrain(0.001));  // nothing is draining
  EXPECT_EQ(pool->Numbers().waits, 0);
}

// Whichever call comes first after a release has run must notice it.
TEST(DeviceTest, EveryCallSeesThatAReleaseHasRun) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 8);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const auto release_all = [&](std::int32_t slot) {
    machine.fake().HoldStream(machine.stream());
    Release(pool.get(), &program, slot);
    machine.fake().ReleaseStream(machine.stream());
  };
  const std::int32_t small = Acquire(pool.get(), &program, 16), large = Acquire(pool.get(), &program, 112);
  release_all(large);
  BlockReferences blocks;
  EXPECT_TRUE(Mentions(pool->BlockMap(large, &blocks), "slot " + std::to_string(large) + " is free"));

  const std::int32_t again = Acquire(pool.get(), &program, 112);
  release_all(again);
  bool ok = false;
  const std::int32_t tokens = 32;
  EXPECT_OK(pool->MapChecked("map_slots", 1, &small, &tokens, 1, &ok));
  EXPECT_TRUE(ok) << "the released slot's blocks can be had";

  release_all(small);
  EXPECT_TRUE(Mentions(pool->Commit(small, {1}), "slot " + std::to_string(small) + " is free"));
}

TEST(DeviceTest, UndoneCallsLeaveNothingOnTheDevice) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 8);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  Claim claim = pool->Acquire({16});
  EXPECT_OK(claim.status);
  UndoAcquire(*pool, claim.slots);
  EXPECT_EQ(pool->Numbers().slots_occupied, 0);
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  EXPECT_OK(StartRelease(*pool, {slot}));
  UndoRelease(*pool, {slot});
  program.Write(slot, 16);
  EXPECT_OK(pool->TakeFault());
  Release(pool.get(), &program, slot);
  EXPECT_EQ(pool->Numbers().slots_parked, 1);
}

TEST(DeviceTest, MapSlotsIsMappedByTheHostOnceChecked) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 4);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t a = Acquire(pool.get(), &program, 16);
  const std::int32_t b = Acquire(pool.get(), &program, 16);
  const std::int32_t slots[] = {a, -1, b};
  const std::int32_t tokens[] = {33, 5, 40};
  bool ok[3] = {};
  EXPECT_OK(pool->MapChecked("map_slots", 1, slots, tokens, 3, ok));
  EXPECT_TRUE(ok[0]);
  EXPECT_TRUE(ok[1]);
  EXPECT_FALSE(ok[2]);  // no blocks left for it
  EXPECT_EQ(machine.Find(1)->slots[a].room, 48);
  EXPECT_EQ(machine.Find(1)->slots[b].room, 16);
  const std::int32_t more_than_a_slot_has[] = {129, 1 << 30, 16};
  EXPECT_OK(pool->MapChecked("map_slots", 1, slots, more_than_a_slot_has, 3, ok));
  EXPECT_FALSE(ok[0]);
  EXPECT_TRUE(ok[1]);
  EXPECT_TRUE(ok[2]);
  EXPECT_EQ(machine.Find(1)->slots[a].room, 48);
  EXPECT_EQ(pool->Numbers().waits, 2);
  EXPECT_TRUE(
      Mentions(pool->MapChecked("map_slots", 0, slots, tokens, 3, ok), "stale cache: it belongs to generation 0"));
  const std::int32_t free_slot = 3;
  EXPECT_TRUE(Mentions(pool->MapChecked("map_slots", 1, &free_slot, tokens, 1, ok), "slot 3 is free"));
  const std::int32_t wild = 4;
  EXPECT_TRUE(Mentions(pool->MapChecked("map_slots", 1, &wild, tokens, 1, ok), "slot 4 does not exist"));
  pool->Close();
  EXPECT_TRUE(Mentions(pool->MapChecked("map_slots", 1, slots, tokens, 3, ok), "map_slots: pool 1 is closed"));
}

TEST(DeviceTest, ViewsAreRefusedInWords) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 4);
  EXPECT_TRUE(Mentions(pool->AddView(0, -1), "view: pool 1 lies in device memory"));
}

TEST(DeviceTest, PoisonReachesDeviceMemory) {
  Machine machine;
  PoolOptions options;
  options.poison = true;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 4, 0, options);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  for (int round = 0; round < 2; ++round) {
    const std::int32_t slot = Acquire(pool.get(), &program, 16);
    const float* first = reinterpret_cast<const float*>(pool->View().At(slot, 0, 0, 0, 0));
    EXPECT_NE(*first, *first);
    program.Write(slot, 1);
    EXPECT_EQ(*first, 0.0f);
    Release(pool.get(), &program, slot);
  }
}

}  // namespace kvpage::testing
