// Pools with a mirror, on the fake driver: what programs find in the table, what the host learns from them, and who
// waits for whom.
#include <atomic>
#include <thread>

#include "tests/device_util.h"

namespace kvpage::testing {

TEST(TableSaysWhatTheHostDecided) {
  Machine machine;
  PoolOptions options;
  options.allow_stale = true;
  const std::shared_ptr<Pool> pool = machine.MakePool(7, 16, 0, options);
  const DevicePool* entry = machine.Find(7);
  CHECK(entry != nullptr);
  if (entry == nullptr) return;
  CHECK_EQ(entry->open, 1);
  CHECK_EQ(entry->allow_stale, 1);
  CHECK_EQ(entry->view.base, pool->View().base);
  CHECK_EQ(entry->view.slot_stride, pool->View().slot_stride);
  for (int i = 0; i < 8; ++i) CHECK_EQ(entry->spec[i], pool->geometry().spec()[i]);
  DeviceProgram program(&machine, 7);
  program.Restart(pool.get());
  CHECK_EQ(entry->generation, 1);
  CHECK_EQ(entry->epoch, program.epoch());

  // Room is there before a program can ask for it, in whole blocks and never beyond max_seq_len.
  const std::int32_t a = Acquire(pool.get(), &program, 20);
  CHECK_EQ(entry->slots[a].room, 32);
  const std::int32_t b = Acquire(pool.get(), &program, 0);
  CHECK_EQ(entry->slots[b].room, 0);
  CHECK_OK(pool->Extend({a, b}, {33, 1}).status);
  CHECK_EQ(entry->slots[a].room, 48);
  CHECK_EQ(entry->slots[b].room, 16);
  CHECK_OK(pool->Extend({a, b}, {10, 128}).status);  // never lowered while a slot is occupied
  CHECK_EQ(entry->slots[a].room, 48);
  CHECK_EQ(entry->slots[b].room, 128);
  program.Write(a, 48);
  CHECK_EQ(program.length(a), 48);
  CHECK_OK(pool->TakeFault());
  program.Write(a, 1);
  CHECK_EQ(pool->TakeFault().message(),
           "append_kv: slot " + std::to_string(a) +
               ": 49 tokens wanted, 48 mapped: map_slots in the program or pool.extend before it makes room");
}

TEST(CallsThatChangeNothingOnTheDeviceAskNothingOfTheDriver) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 100);
  const std::int64_t before = machine.fake().total_calls();
  for (int token = 1; token <= 100; ++token) CHECK_OK(pool->Extend({slot}, {token}).status);
  CHECK_OK(pool->Commit(slot, std::vector<std::int32_t>(100, 7)));
  CHECK_OK(pool->TakeFault());
  CHECK_EQ(pool->Numbers().slots_occupied, 1);
  CHECK_OK(pool->StartRelease({slot}));
  CHECK_EQ(machine.fake().total_calls(), before);
  program.Release(slot);
}

TEST(DrainingEndsWhenTheReleaseHasRun) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 8);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 128);
  machine.fake().HoldStream(machine.stream());
  program.Write(slot, 5);
  Release(pool.get(), &program, slot);
  CHECK_EQ(pool->Numbers().slots_draining, 1);
  Claim claim = pool->Acquire({1});
  CHECK_EQ(static_cast<int>(claim.status.code()), static_cast<int>(Code::kResourceExhausted));
  CHECK_EQ(claim.draining, 8);
  CHECK(!pool->WaitForDrain(0.002));

  std::atomic<bool> drained{false};
  std::thread waiter([&] {
    CHECK(pool->WaitForDrain(30));
    drained = true;
  });
  Pause();
  CHECK(!drained);
  CHECK_OK(pool->Commit(Acquire(pool.get(), &program, 0), {}));  // no lock is held meanwhile
  machine.fake().ReleaseStream(machine.stream());
  waiter.join();
  CHECK_EQ(pool->Numbers().slots_draining, 0);
  CHECK_EQ(pool->Rows().size(), std::size_t{1});

  // The next owner's release is waited for anew.
  const std::int32_t next = Acquire(pool.get(), &program, 128);
  CHECK_EQ(next, slot);
  machine.fake().HoldStream(machine.stream());
  Release(pool.get(), &program, next);
  CHECK_EQ(pool->Numbers().slots_draining, 1);
  machine.fake().ReleaseStream(machine.stream());
  CHECK_EQ(pool->Numbers().slots_draining, 0);
  CHECK(!pool->WaitForDrain(0.001));  // nothing drains
  CHECK_EQ(pool->Numbers().waits, 0);
}

TEST(UndoneCallsLeaveNothingOnTheDevice) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 8);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  Claim claim = pool->Acquire({16});
  CHECK_OK(claim.status);
  pool->UndoAcquire(claim.slots);
  CHECK_EQ(pool->Numbers().slots_occupied, 0);
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  CHECK_OK(pool->StartRelease({slot}));
  pool->UndoRelease({slot});
  program.Write(slot, 16);
  CHECK_OK(pool->TakeFault());
  Release(pool.get(), &program, slot);
  CHECK_EQ(pool->Numbers().slots_parked, 1);
}

TEST(NewLineWaitsForWhatPassedItsCheckAndRestoresLengths) {
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
  CHECK_OK(pool->StartRelease({c}));  // its program will never come
  program.Write(a, 5, /*advance=*/false);

  // A launch that has passed its check still writes when the new generation is asked for.
  machine.fake().HoldStream(machine.stream());
  std::atomic<bool> ran{false};
  {
    const DeviceState::Queueing queueing(machine.device().get(), machine.stream());
    machine.fake().Enqueue(machine.stream(), [&] { ran = true; });
  }
  program.Write(a, 1);  // queued, but checked only after the generation is said to be over
  std::atomic<bool> done{false};
  Pool::Generation generation;
  std::thread restart([&] {
    CHECK_OK(pool->NewGeneration(&generation));
    CHECK(ran);
    done = true;
  });
  Pause();
  CHECK(!done);
  CHECK_OK(pool->Commit(a, {7}));  // the slot table is not locked meanwhile
  machine.fake().ReleaseStream(machine.stream());
  restart.join();
  CHECK_EQ(pool->Numbers().waits, 1);
  CHECK_EQ(generation.generation, 2);
  CHECK_EQ(generation.lengths[a], 10);
  CHECK_EQ(generation.lengths[b], -1);
  CHECK_EQ(generation.lengths[c], -1);
  CHECK_EQ(pool->Numbers().slots_draining, 0);
  const DevicePool* entry = machine.Find(1);
  CHECK_EQ(entry->slots[a].room, 64);
  CHECK_EQ(entry->slots[a].since, generation.epoch);
  CHECK_EQ(entry->written[a * kLayers], 10);  // rows beyond may be half written
  CHECK_EQ(entry->slots[c].length, 0);
  const Status stale = pool->TakeFault();
  CHECK(Mentions(stale, "append_kv: stale cache: it belongs to generation 1 of pool 1, which is at generation 2"))
      << stale.message();
  program.Use(generation);
  program.Write(a, 1);
  CHECK_EQ(program.length(a), 11);
  CHECK_OK(pool->TakeFault());
}

TEST(NewLineShowsNoOneElsesLength) {
  // A slot acquired on the host whose program never ran has length 0, whatever its last owner had.
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 64);
  program.Write(slot, 50);
  Release(pool.get(), &program, slot);
  const Claim claim = pool->Acquire({64});
  CHECK_EQ(claim.slots[0], slot);
  program.Restart(pool.get());
  CHECK_EQ(program.length(slot), 0);
  CHECK_EQ(machine.Find(1)->written[slot * kLayers], 0);
  // Released without its program, then started over: the same.
  program.Write(slot, 20);
  CHECK_OK(pool->StartRelease({slot}));
  program.Restart(pool.get());
  CHECK_EQ(program.length(slot), -1);
  CHECK_EQ(pool->Acquire({64}).slots[0], slot);
  program.Restart(pool.get());
  CHECK_EQ(program.length(slot), 0);
}

TEST(FaultsAreRaisedOnceByTheNextCall) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  const std::shared_ptr<Pool> other = machine.MakePool(2, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  other->Numbers();
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  const auto provoke = [&] { program.Acquire(slot); };
  const std::string text = "acquire: slot " + std::to_string(slot) + " is already occupied in this cache";
  const std::vector<std::function<Status()>> calls = {
      [&] { return pool->Acquire({16}).status; },
      [&] { return pool->Extend({slot}, {1}).status; },
      [&] { return pool->StartRelease({slot}); },
      [&] { return pool->Commit(slot, {7}); },
      [&] {
        std::int64_t freed = 0;
        return pool->Trim(&freed);
      },
      [&] { return pool->Resize(16 * 4096).status; },
      [&] { return pool->TakeFault(); },
  };
  for (const auto& call : calls) {
    provoke();
    program.Write(slot, 17);  // a second fault before the host has looked: the first counts
    CHECK_OK(other->TakeFault());
    CHECK_EQ(pool->Numbers().slots_occupied, 1);  // looking raises nothing
    CHECK_EQ(pool->Rows().size(), std::size_t{1});
    const Status status = call();
    CHECK(Mentions(status, text)) << status.message();
    CHECK_EQ(pool->Numbers().slots_occupied, 1);
    CHECK_OK(pool->TakeFault());
    CHECK_EQ(machine.Find(1)->faulted, 0u);
  }
  program.Write(slot, 16);  // the generation was never broken
  CHECK_EQ(program.length(slot), 16);
  // A new generation is the way on after a fault, which waits to be asked for.
  provoke();
  program.Restart(pool.get());
  CHECK(Mentions(pool->TakeFault(), text));
}

TEST(FaultsOfUnknownPoolsAreRaisedByAnyPoolOfTheDevice) {
  Machine machine(2);
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  const std::shared_ptr<Pool> elsewhere = machine.MakePool(3, 16, 1);
  std::shared_ptr<Pool> registered = machine.MakePool(900, 16);
  Register(registered);  // gives it an id of this process
  DeviceProgram stranger(&machine, 1000);
  stranger.Use({1, 1, {0, 0, 0, 0}});
  stranger.Write(0, 1);
  CHECK_OK(elsewhere->TakeFault());
  CHECK_EQ(pool->TakeFault().message(),
           "append_kv: there is no pool 1000 in this process: a cache works in the process that made it");
  CHECK_OK(pool->TakeFault());
  DeviceProgram misplaced(&machine, registered->id(), 1);
  misplaced.Use({1, 1, {0, 0, 0, 0}});
  misplaced.Write(0, 1);
  CHECK(Mentions(elsewhere->TakeFault(), "lives on another device than the program ran on"));
  Unregister(registered->id());
  misplaced.Write(0, 1);
  CHECK(Mentions(elsewhere->TakeFault(), "pool " + std::to_string(registered->id()) + " is closed: make a new pool"));
}

TEST(PoolsWhoseIdsCollideKeepTheirEntries) {
  Machine machine(2);
  std::vector<std::shared_ptr<Pool>> pools;
  for (std::int32_t id : {5, 5 + kMaxDevicePools, 6, 5 + 2 * kMaxDevicePools}) pools.push_back(machine.MakePool(id, 4));
  const std::shared_ptr<Pool> same_id = machine.MakePool(5, 4, 1);
  const auto works = [&](Pool* pool, int device) {
    DeviceProgram program(&machine, pool->id(), device);
    program.Restart(pool);
    const std::int32_t slot = Acquire(pool, &program, 16);
    program.Write(slot, 3);
    CHECK_EQ(program.length(slot), 3);
    Release(pool, &program, slot);
    CHECK_OK(pool->TakeFault());
    CHECK_EQ(machine.Find(pool->id(), device)->view.base, pool->View().base);
  };
  for (const auto& pool : pools) works(pool.get(), 0);
  works(same_id.get(), 1);
  // One leaves from the middle: those behind it are still found, and its place is taken again.
  pools[1]->Close();
  pools.erase(pools.begin() + 1);
  CHECK(machine.Find(5 + kMaxDevicePools) == nullptr);
  for (const auto& pool : pools) works(pool.get(), 0);
  pools.push_back(machine.MakePool(5 + 3 * kMaxDevicePools, 4));
  CHECK_EQ(machine.Find(5 + 3 * kMaxDevicePools) - machine.device()->table(), 6);
  for (const auto& pool : pools) works(pool.get(), 0);
}

TEST(ADeviceHasRoomForSoManyPools) {
  Machine machine;
  PinnedMemory image;
  CHECK_OK(PinnedMemory::Make(machine.device()->context(), sizeof(DevicePool), "for a test", &image));
  DevicePool* entry = new (image.data()) DevicePool;
  std::int32_t place = -1;
  for (std::int32_t i = 0; i < kMaxDevicePools; ++i) {
    entry->id = 1000 + i;
    CHECK_OK(machine.device()->AddEntry(entry, &place));
  }
  entry->id = 3;
  const Status full = machine.device()->AddEntry(entry, &place);
  CHECK(Mentions(full, "CUDA device 0 has 256 pools of this process already, as many as it can: close one"))
      << full.message();
  CHECK_OK(machine.device()->RemoveEntry(17));
  CHECK_OK(machine.device()->AddEntry(entry, &place));
  CHECK_EQ(place, 17);
  CHECK(machine.Find(3) != nullptr);
}

TEST(CloseWaitsForTheProgramInFlightAndRefusesTheNext) {
  Machine machine;
  std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  const std::shared_ptr<Pool> other = machine.MakePool(2, 16);
  machine.fake().HoldStream(machine.stream());
  std::atomic<bool> touched{false};
  {
    const DeviceState::Queueing queueing(machine.device().get(), machine.stream());
    machine.fake().Enqueue(machine.stream(), [&, view = pool->View()] {
      *view.At(slot, 0, 0, 0, 0) = 1;  // the memory is still there
      touched = true;
    });
  }
  std::atomic<bool> closed{false};
  std::thread closer([&] {
    pool->Close();
    closed = true;
  });
  Pause();
  CHECK(!closed);
  CHECK_OK(other->Acquire({16}).status);  // nobody else waits
  machine.fake().ReleaseStream(machine.stream());
  closer.join();
  CHECK(touched);
  CHECK_EQ(pool->Numbers().waits, 1);
  const int launches = program.launches();
  program.Write(slot, 1);
  CHECK_EQ(program.launches(), launches);
  CHECK_EQ(machine.Find(1)->fault->kind, static_cast<std::int32_t>(FaultKind::kClosed));
  CHECK(Mentions(pool->Acquire({1}).status, "pool 1 is closed"));
  // What looked the pool up before it left the table may still be running when the memory goes: it is waited for too.
  machine.fake().HoldStream(machine.stream());
  program.Write(slot, 1);
  std::thread last([&] { pool.reset(); });
  Pause();
  machine.fake().ReleaseStream(machine.stream());
  last.join();
  CHECK(machine.Find(1) == nullptr);
  program.Write(slot, 1);
  CHECK_EQ(program.launches(), launches);
  CHECK(Mentions(other->TakeFault(), "pool 1"));
}

TEST(ProgramsInGraphsAreWaitedForWhereverTheyRun) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  const cu::Stream capture = machine.NewStream();
  const cu::Stream replay = machine.NewStream();
  machine.fake().SetCapturing(capture, true);
  program.set_stream(capture);
  program.Write(slot, 1);
  machine.fake().SetCapturing(capture, false);
  machine.fake().HoldStream(replay);
  machine.fake().Enqueue(replay, [] {});
  std::atomic<bool> done{false};
  std::thread restart([&] {
    Pool::Generation generation;
    CHECK_OK(pool->NewGeneration(&generation));
    done = true;
  });
  Pause();
  CHECK(!done);
  machine.fake().ReleaseStream(replay);
  restart.join();
  CHECK_EQ(pool->Numbers().waits, 1);
}

TEST(MapSlotsIsMappedByTheHostOnceChecked) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 4);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t a = Acquire(pool.get(), &program, 16);
  const std::int32_t b = Acquire(pool.get(), &program, 16);
  const std::int32_t slots[] = {a, -1, b};
  const std::int32_t tokens[] = {33, 5, 40};
  bool ok[3] = {};
  CHECK_OK(pool->MapChecked("map_slots", 1, slots, tokens, 3, ok));
  CHECK(ok[0]);
  CHECK(ok[1]);
  CHECK(!ok[2]);  // no blocks left for it
  CHECK_EQ(machine.Find(1)->slots[a].room, 48);
  CHECK_EQ(machine.Find(1)->slots[b].room, 16);
  CHECK_EQ(pool->Numbers().waits, 1);
  CHECK(Mentions(pool->MapChecked("map_slots", 0, slots, tokens, 3, ok), "stale cache: it belongs to generation 0"));
  const std::int32_t free_slot = 3;
  CHECK(Mentions(pool->MapChecked("map_slots", 1, &free_slot, tokens, 1, ok), "slot 3 is free"));
  const std::int32_t wild = 4;
  CHECK(Mentions(pool->MapChecked("map_slots", 1, &wild, tokens, 1, ok), "slot 4 does not exist"));
  pool->Close();
  CHECK(Mentions(pool->MapChecked("map_slots", 1, slots, tokens, 3, ok), "map_slots: pool 1 is closed"));
}

TEST(ViewsAreRefusedInWords) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 4);
  CHECK(Mentions(pool->AddView(0, -1), "view: pool 1 lies in device memory"));
}

TEST(PoisonReachesDeviceMemory) {
  Machine machine;
  PoolOptions options;
  options.poison = true;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 4, 0, options);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  for (int round = 0; round < 2; ++round) {
    const std::int32_t slot = Acquire(pool.get(), &program, 16);
    const float* first = reinterpret_cast<const float*>(pool->View().At(slot, 0, 0, 0, 0));
    CHECK(*first != *first);
    program.Write(slot, 1);
    CHECK_EQ(*first, 0.0f);
    Release(pool.get(), &program, slot);
  }
}

}  // namespace kvpage::testing

int main(int argc, char** argv) { return kvpage::testing::RunAll(argc, argv); }
