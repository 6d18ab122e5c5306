// A fault at every driver call that a pool on a device makes: the call fails with an error, and the pool and its table
// entry are unchanged. Also many threads at once.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <thread>

#include "tests/device_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

// The state of a pool as programs see it and as the host reports it.
std::string Snapshot(Machine* machine, Pool* pool) {
  const PoolNumbers n = pool->Numbers();
  std::string text;
  for (std::int64_t value : {n.blocks_mapped, n.blocks_parked, n.blocks_draining, n.slots_occupied, n.slots_draining}) {
    text += std::to_string(value) + " ";
  }
  const DevicePool* entry = machine->Find(pool->id());
  text += std::to_string(entry->open) + " " + std::to_string(entry->epoch) + ":";
  for (int slot = 0; slot < kSlots; ++slot) {
    text += " " + std::to_string(entry->slots[slot].room) + "/" + std::to_string(entry->slots[slot].length);
  }
  return text;
}

// Runs `call` with a fault at its first, second, ... driver call until none strikes any more. `check` runs after each
// call that failed.
int AtEveryCall(Machine* machine, cu::Result result, const std::function<Status()>& call,
                const std::function<void(const Status&)>& check) {
  for (int n = 1; n < 100; ++n) {
    machine->fake().FailAtAny(n, result);
    const std::int64_t before = machine->fake().faults();
    const Status status = call();
    machine->fake().ClearFaults();
    if (machine->fake().faults() == before) {
      EXPECT_OK(status);
      return n - 1;
    }
    check(status);
  }
  EXPECT_TRUE(false) << "never succeeded";
  return 0;
}

}  // namespace

TEST(DeviceFaultsTest, OpeningFailsAtEveryCallAndLeavesNothing) {
  Machine machine;
  const FakeDriver::State before = machine.fake().Report();
  std::shared_ptr<Pool> pool;
  const int calls = AtEveryCall(
      &machine, cu::Result::kUnknown, [&] { return machine.Open(5, 4, &pool); },
      [&](const Status& status) {
        if (status.ok()) return pool.reset();  // it succeeded despite the fault
        EXPECT_TRUE(Mentions(status, "failed with")) << status.message();
        EXPECT_EQ(pool, nullptr);
        EXPECT_EQ(machine.Find(5), nullptr);
        const FakeDriver::State after = machine.fake().Report();
        EXPECT_EQ(after.reservations, before.reservations);
        EXPECT_EQ(after.allocations, before.allocations);
        EXPECT_EQ(after.host_allocations, before.host_allocations);
      });
  EXPECT_GT(calls, 10) << calls;
  EXPECT_NE(machine.Find(5), nullptr);
}

TEST(DeviceFaultsTest, ADeviceThatCannotBeOpenedLeavesNothing) {
  FakeDriver::Options options;
  options.granularity = 4096;
  std::unique_ptr<FakeDriver> fake;
  EXPECT_OK(FakeDriver::Make(options, &fake));
  std::shared_ptr<DeviceState> device;
  for (int n = 1; device == nullptr && n < 100; ++n) {
    fake->FailAtAny(n, cu::Result::kUnknown);
    const Status status = DeviceState::Make(fake->driver(), 0, &device);
    fake->ClearFaults();
    EXPECT_EQ(status.ok(), device != nullptr);
    if (!status.ok()) {
      EXPECT_TRUE(fake->Report().empty()) << fake->Report().ToString();
    }
  }
  EXPECT_NE(device, nullptr);
}

TEST(DeviceFaultsTest, HostCallsFailAtEveryDriverCallAndChangeNothing) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  program.Write(slot, 16);
  const std::vector<std::int32_t> slots = {slot};
  const std::string before = Snapshot(&machine, pool.get());
  const auto unchanged = [&](const Status& status) {
    EXPECT_FALSE(status.ok());
    EXPECT_TRUE(Mentions(status, "failed with")) << status.message();
    EXPECT_EQ(Snapshot(&machine, pool.get()), before);
  };
  std::vector<std::int32_t> taken;
  int calls = AtEveryCall(
      &machine, cu::Result::kUnknown,
      [&] {
        Claim claim = pool->Acquire({40});
        taken = claim.slots;
        return claim.status;
      },
      unchanged);
  EXPECT_GT(calls, 4) << calls;
  EXPECT_EQ(machine.Find(1)->slots[taken[0]].room, 48);
  UndoAcquire(*pool, taken);
  std::int64_t freed = 0;
  EXPECT_OK(pool->Trim(&freed));
  calls = AtEveryCall(
      &machine, cu::Result::kUnknown, [&] { return pool->Extend(slots, {60}).status; },
      [&](const Status& status) {
        EXPECT_FALSE(status.ok());
        EXPECT_EQ(machine.Find(1)->slots[slot].room, 16);
        EXPECT_EQ(pool->Numbers().blocks_mapped, 1);
      });
  EXPECT_GT(calls, 4) << calls;
  EXPECT_EQ(machine.Find(1)->slots[slot].room, 64);
  const std::int32_t tokens = 100;
  bool ok = false;
  calls = AtEveryCall(
      &machine, cu::Result::kUnknown, [&] { return pool->MapChecked("map_slots", 1, &slot, &tokens, 1, &ok); },
      [&](const Status& status) {
        EXPECT_TRUE(Mentions(status, "map_slots: slot ")) << status.message();
        EXPECT_EQ(machine.Find(1)->slots[slot].room, 64);
      });
  EXPECT_GT(calls, 4) << calls;
  EXPECT_TRUE(ok);
  program.Write(slot, 84);
  EXPECT_OK(pool->TakeFault());
}

TEST(DeviceFaultsTest, ALineThatCannotBeStartedCanBeStartedLater) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 64);
  const std::int32_t gone = Acquire(pool.get(), &program, 16);
  program.Write(slot, 10);
  EXPECT_OK(StartRelease(*pool, {gone}));
  Pool::Generation generation;
  for (cu::Call call : {cu::Call::kCtxPushCurrent, cu::Call::kMemcpyHtoDAsync, cu::Call::kMemcpyDtoHAsync,
                        cu::Call::kStreamSynchronize}) {
    if (pool->Numbers().slots_draining == 0) {
      EXPECT_OK(StartRelease(*pool, pool->Acquire({16}).slots));
    }
    int failed = 0;
    for (int n = 1; n < 20; ++n) {
      machine.fake().FailAt(call, n, cu::Result::kUnknown);
      const std::int64_t before = machine.fake().faults();
      generation = {};
      const Status status = pool->NewGeneration(&generation);
      machine.fake().ClearFaults();
      if (machine.fake().faults() == before) break;
      EXPECT_TRUE(Mentions(status, "failed with")) << status.message();
      ++failed;
      EXPECT_EQ(pool->Numbers().slots_draining, 1);
    }
    EXPECT_GT(failed, 0) << cu::Symbol(call);
  }
  EXPECT_EQ(generation.lengths[slot], 10);
  EXPECT_EQ(generation.lengths[gone], -1);
  program.Use(generation);
  program.Write(slot, 54);
  EXPECT_EQ(program.length(slot), 64);
  EXPECT_OK(pool->TakeFault());
}

TEST(DeviceFaultsTest, AFaultThatCannotBeClearedIsRaisedAgain) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  program.Write(slot, 17);
  machine.fake().FailAt(cu::Call::kMemcpyHtoDAsync, 1, cu::Result::kUnknown);
  EXPECT_TRUE(Mentions(pool->TakeFault(), "17 tokens wanted"));
  EXPECT_TRUE(Mentions(pool->TakeFault(), "17 tokens wanted"));
  EXPECT_OK(pool->TakeFault());
  program.Write(slot, 18);
  EXPECT_TRUE(Mentions(pool->TakeFault(), "18 tokens wanted"));
}

TEST(DeviceFaultsTest, APoolThatCannotLeaveTheTableLeavesItsMemoryThere) {
  // Whoever finds the entry may still read and write it.
  FakeDriver::Options options;
  options.granularity = 4096;
  std::unique_ptr<FakeDriver> fake;
  EXPECT_OK(FakeDriver::Make(options, &fake));
  {
    std::shared_ptr<DeviceState> device;
    EXPECT_OK(DeviceState::Make(fake->driver(), 0, &device));
    const Geometry geometry = DeviceGeometry();
    std::unique_ptr<DeviceMirror> mirror;
    EXPECT_OK(DeviceMirror::Make(device, geometry, nullptr, PoolOptions(), &mirror));
    EXPECT_OK(mirror->Open(3));
    const FakeDriver::State before = fake->Report();
    fake->FailAt(cu::Call::kMemcpyHtoDAsync, 1, cu::Result::kUnknown, 100);
    mirror.reset();
    fake->ClearFaults();
    EXPECT_EQ(fake->Report().allocations, before.allocations);
    EXPECT_EQ(fake->Report().host_allocations, before.host_allocations);
  }
}

TEST(DeviceFaultsTest, ManyThreadsAndOneDevice) {
  Machine machine;
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < 4; ++round) {
        const std::int32_t id = 1 + t + 3 * round;
        const std::shared_ptr<Pool> pool = machine.MakePool(id, 8);
        DeviceProgram program(&machine, id);
        program.set_stream(machine.NewStream());
        program.Restart(pool.get());
        std::atomic<bool> stop{false};
        std::thread looker([&] {
          while (!stop) {
            pool->Numbers();
            EXPECT_OK(pool->TakeFault());
            static_cast<void>(pool->WaitForDrain(0.0001));
          }
        });
        for (int i = 0; i < 20; ++i) {
          const std::int32_t slot = Acquire(pool.get(), &program, 32);
          program.Write(slot, 20);
          EXPECT_OK(pool->Extend({slot}, {40}).status);
          program.Write(slot, 20);
          Release(pool.get(), &program, slot);
        }
        stop = true;
        looker.join();
        EXPECT_EQ(pool->Numbers().slots_draining, 0);
        EXPECT_EQ(program.launches(), 80);
        pool->Close();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace kvpage::testing
