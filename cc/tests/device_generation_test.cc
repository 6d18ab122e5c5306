// Generations and the end of pools on the fake driver: who waits for whom, and the restored lengths.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>

#include "tests/device_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {

TEST(DeviceGenerationTest, NewGenerationWaitsForWhatPassedItsCheckAndRestoresLengths) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t a = Acquire(pool.get(), &program, 64);
  const std::int32_t b = Acquire(pool.get(), &program, 16);
  const std::int32_t c = Acquire(pool.get(), &program, 16);
  program.Write(a, 10);
  program.Write(b, 16);
  Release(pool.get(), &program, b);
  EXPECT_OK(StartRelease(*pool, {c}));  // its program never runs

  // An op that has passed its check is still writing when the new generation is requested.
  program.HoldAfterCheck(machine.stream());
  program.Write(a, 5, /*advance=*/false);
  program.Write(a, 1);  // queued, but checked only after the generation has been declared over
  const auto last = [&, view = pool->View()] { return *reinterpret_cast<const float*>(view.At(a, 14, 0, 0, 0)); };
  EXPECT_NE(last(), 14.0f);
  std::atomic<bool> done{false};
  Pool::Generation generation;
  std::thread restart([&] {
    EXPECT_OK(pool->NewGeneration(&generation));
    EXPECT_EQ(last(), 14.0f);
    done = true;
  });
  Pause();
  EXPECT_FALSE(done);
  EXPECT_OK(pool->Commit(a, {7}));  // the slot table is not locked meanwhile
  machine.fake().ReleaseStream(machine.stream());
  restart.join();
  EXPECT_EQ(pool->Numbers().waits, 1);
  EXPECT_EQ(generation.generation, 2);
  EXPECT_EQ(generation.lengths[a], 10);
  EXPECT_EQ(generation.lengths[b], -1);
  EXPECT_EQ(generation.lengths[c], -1);
  EXPECT_EQ(pool->Numbers().slots_draining, 0);
  const DevicePool* entry = machine.Find(1);
  EXPECT_EQ(entry->slots[a].room, 64);
  EXPECT_EQ(entry->slots[a].since, generation.epoch);
  EXPECT_EQ(entry->written[a * kLayers], 10);  // tokens beyond this may be partly written
  EXPECT_EQ(entry->slots[c].length, 0);
  const Status stale = pool->TakeFault();
  EXPECT_TRUE(Mentions(stale, "append_kv: stale cache: it belongs to generation 1 of pool 1, which is at generation 2"))
      << stale.message();
  program.Use(generation);
  program.Write(a, 1);
  EXPECT_EQ(program.length(a), 11);
  EXPECT_OK(pool->TakeFault());
}

TEST(DeviceGenerationTest, NewGenerationShowsNoOneElsesLength) {
  // A slot acquired on the host whose program never ran is free, regardless of its last owner.
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 64);
  program.Write(slot, 50);
  Release(pool.get(), &program, slot);
  const Claim claim = pool->Acquire({64});
  EXPECT_EQ(claim.slots[0], slot);
  program.Restart(pool.get());
  EXPECT_EQ(program.length(slot), -1);
  EXPECT_EQ(machine.Find(1)->written[slot * kLayers], 0);
  // The same for a slot released without its program, before a new generation.
  EXPECT_EQ(Acquire(pool.get(), &program, 64), slot);
  program.Write(slot, 20);
  EXPECT_OK(StartRelease(*pool, {slot}));
  program.Restart(pool.get());
  EXPECT_EQ(program.length(slot), -1);
  EXPECT_EQ(Acquire(pool.get(), &program, 64), slot);
  program.Restart(pool.get());
  EXPECT_EQ(program.length(slot), 0);
}

TEST(DeviceGenerationTest, NewGenerationFreesSlotsWhoseAcquireTheDeviceRefused) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  DeviceProgram refused(&machine, 1);  // has a cache that is not this pool's
  Pool::Generation foreign;
  foreign.generation = 99;
  foreign.lengths.assign(kSlots, -1);
  refused.Use(foreign);
  // In a pool without a generation so far: the host learns of the fault only after it has handed out the slot.
  const std::int32_t lost = Acquire(pool.get(), &refused, 64);
  EXPECT_TRUE(Mentions(pool->TakeFault(), "generation 99"));
  EXPECT_EQ(pool->Numbers().slots_occupied, 1);
  program.Restart(pool.get());
  EXPECT_EQ(program.length(lost), -1);
  EXPECT_EQ(pool->Numbers().slots_occupied, 0);
  EXPECT_EQ(pool->Numbers().slots_draining, 0);

  // The same next to a slot that was acquired on the device, and one that the host releases before it learns of the
  // fault.
  const std::int32_t kept = Acquire(pool.get(), &program, 16);
  program.Write(kept, 9);
  const Claim claim = pool->Acquire({64, 16});
  EXPECT_OK(claim.status);
  const std::int32_t second = claim.slots[0], third = claim.slots[1];
  for (const std::int32_t slot : claim.slots) refused.Acquire(slot);
  EXPECT_TRUE(Mentions(pool->TakeFault(), "generation 99"));
  EXPECT_OK(StartRelease(*pool, {third}));  // its program was refused too
  program.Restart(pool.get());
  EXPECT_EQ(program.length(kept), 9);
  EXPECT_EQ(program.length(second), -1);
  EXPECT_EQ(program.length(third), -1);
  EXPECT_EQ(pool->Numbers().slots_occupied, 1);
  EXPECT_EQ(pool->Numbers().slots_draining, 0);
  // Both can be acquired again, with all their room.
  const std::int32_t again = Acquire(pool.get(), &program, 64);
  program.Write(again, 64);
  EXPECT_EQ(program.length(again), 64);
  program.Write(kept, 1);
  EXPECT_EQ(program.length(kept), 10);
  EXPECT_OK(pool->TakeFault());
}

TEST(DeviceGenerationTest, CloseWaitsForTheProgramInFlightAndRefusesTheNext) {
  Machine machine;
  std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  const std::shared_ptr<Pool> other = machine.MakePool(2, 16);
  program.HoldAfterCheck(machine.stream());
  program.Write(slot, 1);  // the memory is still there
  EXPECT_EQ(program.length(slot), 0);
  std::atomic<bool> closed{false};
  std::thread closer([&] {
    pool->Close();
    closed = true;
  });
  Pause();
  EXPECT_FALSE(closed);
  EXPECT_OK(other->Acquire({16}).status);  // nobody else waits
  machine.fake().ReleaseStream(machine.stream());
  closer.join();
  EXPECT_EQ(program.length(slot), 1);
  EXPECT_EQ(pool->Numbers().waits, 1);
  const int launches = program.launches();
  program.Write(slot, 1);
  EXPECT_EQ(program.launches(), launches);
  EXPECT_EQ(machine.Find(1)->fault->kind, static_cast<std::int32_t>(FaultKind::kClosed));
  EXPECT_TRUE(Mentions(pool->Acquire({1}).status, "pool 1 is closed"));
  pool.reset();
  EXPECT_EQ(machine.Find(1), nullptr);
  program.Write(slot, 1);
  EXPECT_EQ(program.launches(), launches);
  EXPECT_TRUE(Mentions(other->TakeFault(), "pool 1"));
}

TEST(DeviceGenerationTest, MemoryWaitsForTheProgramThatFoundThePool) {
  Machine machine;
  std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  program.HoldAfterCheck(machine.stream());
  program.Write(slot, 1);
  std::atomic<bool> gone{false};
  std::thread last([&] {
    pool.reset();  // never closed
    gone = true;
  });
  Pause();
  EXPECT_FALSE(gone);
  // The entry is not given to another pool before its last reader has finished.
  const std::shared_ptr<Pool> next = machine.MakePool(1 + kMaxDevicePools, 16);
  EXPECT_EQ(machine.Find(1 + kMaxDevicePools) - machine.device()->table(), 2);
  machine.fake().ReleaseStream(machine.stream());
  last.join();
  EXPECT_EQ(program.length(slot), 1);
  EXPECT_EQ(machine.Find(1), nullptr);
}

TEST(DeviceGenerationTest, AProgramThatDoesNotEndFailsThePoolAndKeepsItsMemory) {
  Machine machine;
  machine.device()->set_wait_limit(std::chrono::milliseconds{5});
  std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  Pool::Generation generation;
  const auto hang = [&] {
    program.HoldAfterCheck(machine.stream());
    program.Write(slot, 1);
  };
  hang();
  const Status status = pool->NewGeneration(&generation);
  EXPECT_EQ(static_cast<int>(status.code()), static_cast<int>(Code::kInternal));
  EXPECT_TRUE(Mentions(status, "programs on CUDA device 0 still use the pool after 5 ms")) << status.message();
  machine.fake().ReleaseStream(machine.stream());  // as if a debugger had stopped it
  EXPECT_OK(pool->NewGeneration(&generation));
  EXPECT_EQ(generation.lengths[slot], 1);
  program.Use(generation);
  hang();
  const FakeDriver::State before = machine.fake().Report();
  pool->Close();
  pool.reset();
  const FakeDriver::State after = machine.fake().Report();
  EXPECT_EQ(after.mappings, before.mappings);
  EXPECT_EQ(after.reservations, before.reservations);
  EXPECT_EQ(after.allocations, before.allocations);
  EXPECT_EQ(after.host_allocations, before.host_allocations);
  machine.fake().ReleaseStream(machine.stream());
  EXPECT_EQ(program.length(slot), 2);
  machine.LeaveTheRest();
}

TEST(DeviceGenerationTest, ProgramsInGraphsAreWaitedForWhereverTheyRun) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  const cu::Stream capture = machine.NewStream();
  const cu::Stream replay = machine.NewStream();  // no handler ever sees it
  machine.fake().BeginCapture(capture, FakeDriver::CaptureMode::kThreadLocal);
  program.set_stream(capture);
  program.Write(slot, 1);
  const auto graph = machine.fake().EndCapture(capture);
  EXPECT_EQ(program.length(slot), 0);
  program.HoldAfterCheck(replay);
  machine.fake().LaunchGraph(graph, replay);
  std::atomic<bool> done{false};
  std::thread restart([&] {
    Pool::Generation generation;
    EXPECT_OK(pool->NewGeneration(&generation));
    done = true;
  });
  Pause();
  EXPECT_FALSE(done);
  machine.fake().ReleaseStream(replay);
  restart.join();
  EXPECT_EQ(pool->Numbers().waits, 1);
  EXPECT_EQ(program.length(slot), 1);
}

// drop_before unmaps nothing under a cache value that the device would refuse, even if the value becomes stale while
// the call waits.
TEST(DeviceGenerationTest, DroppingChecksTheCacheBeforeItUnmaps) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 64);
  program.Write(slot, 40);
  const auto drop = [&](std::int64_t tokens, std::int32_t generation, std::uint32_t epoch) {
    std::vector<std::int64_t> dropped;
    return pool->DropBefore({slot}, {tokens}, &dropped, {generation, epoch});
  };
  const auto refused = [&](const Status& status, const std::string& text) {
    EXPECT_TRUE(Mentions(status, text)) << status.message();
    EXPECT_EQ(machine.Find(1)->slots[slot].dropped, 0);
    EXPECT_EQ(pool->Rows()[0].dropped, 0);
    EXPECT_EQ(pool->Numbers().blocks_mapped, 4);
  };
  refused(drop(32, 1, program.epoch() - 1), "drop_before: stale cache");
  refused(drop(32, 2, program.epoch()), "drop_before: stale cache");
  refused(drop(48, 1, program.epoch()), "it has 40");

  const cu::Stream other = machine.NewStream();
  program.set_stream(other);
  program.HoldAfterCheck(other);
  program.Write(slot, 1, /*advance=*/false);
  program.set_stream(machine.stream());
  const std::uint32_t epoch = program.epoch();
  Status status;
  std::thread caller([&] { status = drop(32, 1, epoch); });
  EXPECT_TRUE(Becomes(machine.Find(1)->slots[slot].dropped, 32)) << "it waits for the other program";
  program.Write(slot, 1);  // by another thread
  machine.fake().ReleaseStream(other);
  caller.join();
  refused(status, "drop_before: stale cache");

  EXPECT_OK(drop(32, 1, program.epoch()));
  EXPECT_EQ(machine.Find(1)->slots[slot].dropped, 32);
  EXPECT_EQ(pool->Numbers().blocks_mapped, 2);
  EXPECT_OK(pool->TakeFault());
}

}  // namespace kvpage::testing
