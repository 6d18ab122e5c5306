// Many threads on one pool, for ThreadSanitizer: two generations of programs, host calls, inspection, a close midway.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "tests/expect_ok.h"
#include "tests/pool_util.h"

namespace kvpage::testing {
namespace {

constexpr int kRounds = 1000;

// Host calls and programs in the order in which one Python thread would queue them.
void Serve(Pool* pool, std::atomic<std::uint32_t>* newest, std::atomic<int>* completed, const std::atomic<bool>* stop) {
  const KVView view = pool->View();
  std::vector<std::int32_t> lengths(kSlots, -1);
  for (int round = 0; round < kRounds && !stop->load(); ++round) {
    std::uint32_t epoch = newest->load();
    const Claim claim = pool->Acquire({8});
    if (!claim.status.ok()) {
      static_cast<void>(pool->WaitForDrain(0.001));
      continue;
    }
    const std::int32_t slot = claim.slots[0];
    const std::int32_t offsets[] = {0, 4};
    // Two generations of one pool sometimes make each other's caches stale: that gives a status, never a race.
    if (EditOne(pool, "acquire", {1, epoch, lengths.data()}, {0, slot, 0}, &epoch, lengths.data()).ok()) {
      for (std::int32_t tokens = 20; tokens <= 40; tokens += 20) {
        bool ok = false;
        static_cast<void>(pool->MapSlots("map_slots", {1, epoch, lengths.data()}, &slot, &tokens, 1, &ok, &epoch));
        PinnedSlots pinned;
        if (pool->Begin("append_kv", {1, epoch, lengths.data()}, {&slot, 1, offsets, 4}, 0, true, &pinned).ok()) {
          std::memset(view.At(slot, pinned.sequences()[0].position, 0, 0, 0), round, 64);
          epoch = pinned.epoch();
          completed->fetch_add(1);
        }
      }
    }
    if (StartRelease(*pool, {slot}).ok()) {
      static_cast<void>(EditOne(pool, "release", {1, epoch, lengths.data()}, {1, slot, 0}, &epoch, lengths.data()));
    }
    newest->store(epoch);
    lengths.assign(kSlots, -1);
  }
}

TEST(PoolThreadsTest, TwoLinesAndAnObserver) {
  auto pool = MakePool(SmallGeometry(), 12, {/*allow_stale=*/true, false});
  Pool::Generation generation;
  EXPECT_OK(pool->NewGeneration(&generation));
  std::atomic<std::uint32_t> newest{generation.epoch};
  std::atomic<int> completed{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) threads.emplace_back(Serve, pool.get(), &newest, &completed, &stop);
  threads.emplace_back([&] {
    for (int i = 0; i < kRounds; ++i) {
      const PoolNumbers n = pool->Numbers();
      if (n.blocks_mapped + n.blocks_parked + n.blocks_draining + n.blocks_free != n.blocks_total) stop = true;
      static_cast<void>(pool->Rows());
      std::int64_t freed = 0;
      if (i % 10 == 0) static_cast<void>(pool->Trim(&freed));
      if (i % 25 == 0) static_cast<void>(pool->Resize((8 + i % 5) * 4096));
    }
  });
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(stop.load()) << "accounts did not add up";
  EXPECT_GT(completed.load(), 0);
}

// One thread of programs with forks and truncations, one that claims blocks, one that observes, and one that moves
// blocks (on the CPU).
TEST(PoolThreadsTest, ForksAndTruncationsBesideClaims) {
  auto pool = MakePool(SmallGeometry(), 16);
  Program program(pool.get());
  const std::int32_t donor = program.Acquire(40);
  EXPECT_OK(program.Write(donor, 40));
  EXPECT_OK(pool->Commit(donor, std::vector<std::int32_t>(40, 7)));
  std::atomic<bool> stop{false};
  std::atomic<bool> adds_up{true};
  std::thread claims([&] {
    while (!stop.load()) {
      const Claim claim = pool->Acquire({40});
      if (claim.status.ok()) UndoAcquire(*pool, claim.slots);  // its program was never queued
    }
  });
  std::thread observer([&] {
    while (!stop.load()) {
      const PoolNumbers n = pool->Numbers();
      if (n.blocks_mapped + n.blocks_parked + n.blocks_draining + n.blocks_free != n.blocks_total) adds_up = false;
      static_cast<void>(pool->Rows());
      std::int64_t freed = 0;
      static_cast<void>(pool->Trim(&freed));
    }
  });
  std::atomic<bool> sound{true};
  std::thread mover([&] {
    while (kHolesAreReadable && !stop.load()) {
      relocation::Report report;
      if (!pool->Relocate({1 << 20, true, {}, false}, &report).ok() || !pool->Audit().ok()) sound = false;
    }
  });
  int forks = 0;
  for (int round = 0; round < kRounds / 4; ++round) {
    const Claim claim = pool->Fork("fork", {{donor, -1}}, {});
    if (!claim.status.ok()) continue;  // the other thread has the blocks
    const std::int32_t fork = claim.slots[0];
    EXPECT_OK(program.RunFork(fork, donor, 40));
    if (pool->Truncate({fork}, {round % 40}).status.ok()) {
      EXPECT_OK(program.RunTruncate(fork, round % 40));
      EXPECT_OK(program.Write(fork, 1));
    }
    program.Release(fork);
    ++forks;
  }
  stop = true;
  claims.join();
  observer.join();
  mover.join();
  EXPECT_TRUE(sound.load());
  EXPECT_TRUE(adds_up.load());
  EXPECT_GT(forks, 0);
}

TEST(PoolThreadsTest, CloseWaitsForRunningSteps) {
  for (int round = 0; round < 20; ++round) {
    auto pool = MakePool(SmallGeometry(), 8);
    Program program(pool.get());
    const std::int32_t slot = program.Acquire(16);
    std::atomic<bool> begun{false};
    std::atomic<bool> ended{false};
    std::thread worker([&] {
      PinnedSlots pinned;
      const bool ok = program.Begin(slot, 1, 0, true, &pinned).ok();
      begun = true;
      if (ok) std::memset(pool->View().At(slot, 0, 0, 0, 0), 1, 64);
      std::this_thread::yield();
      ended = true;
    });
    while (!begun.load()) std::this_thread::yield();
    pool->Close();
    EXPECT_TRUE(ended.load()) << "close returned while an op ran";
    worker.join();
  }
}

TEST(PoolThreadsTest, AWaiterIsWoken) {
  auto pool = MakePool(SmallGeometry(), 4);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(64);
  EXPECT_OK(StartRelease(*pool, {slot}));
  std::atomic<bool> woken{false};
  std::thread waiter([&] { woken = pool->WaitForDrain(30.0); });
  EXPECT_OK(program.Vacate(slot));
  waiter.join();
  // The waiter may also have started after the drain, when nothing was draining any more.
  EXPECT_EQ(pool->Numbers().slots_draining, 0);
  EXPECT_OK(pool->Acquire({64}).status);
}

}  // namespace
}  // namespace kvpage::testing
