// Host calls that wait for handlers are not starved, block no other call, and can be interrupted.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/pool_util.h"

namespace kvpage::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// Handlers on four threads read `slot`, so that some handler is active at any time, until `call` returns. Returns false
// if it did not within ten seconds.
bool EndsBesideReaders(Pool* pool, const Program& program, std::int32_t slot, const std::function<Status()>& call) {
  const CacheRef cache = program.cache();
  const std::vector<std::int32_t> lengths(cache.lengths, cache.lengths + pool->geometry().max_slots);
  const std::uint32_t epoch = cache.epoch;
  const std::int32_t generation = cache.generation;
  std::atomic<bool> stop{false};
  std::vector<std::thread> readers;
  for (int i = 0; i < 4; ++i) {
    readers.emplace_back([&, i] {
      const std::int32_t offsets[] = {0, 1};
      std::vector<std::int32_t> read(lengths);
      --read[slot];  // read the last token again
      while (!stop.load()) {
        PinnedSlots pinned;
        if (!pool->Begin("paged_attention", {generation, epoch, read.data()}, {&slot, 1, offsets, 1}, 0, false, &pinned)
                 .ok()) {
          break;
        }
        std::this_thread::sleep_for(milliseconds(5 + i));
      }
    });
  }
  std::this_thread::sleep_for(milliseconds(20));
  std::future<Status> ended = std::async(std::launch::async, call);
  const bool in_time = ended.wait_for(seconds(10)) == std::future_status::ready;
  stop = true;
  for (std::thread& reader : readers) reader.join();
  EXPECT_OK(ended.get());
  return in_time;
}

// A handler that reads the slot until it is told to end.
class Reader {
 public:
  Reader(Program* program, std::int32_t slot) { EXPECT_OK(program->Begin(slot, 1, 0, true, &*pinned_)); }
  void End() { pinned_.reset(); }

 private:
  std::unique_ptr<PinnedSlots> pinned_ = std::make_unique<PinnedSlots>();
};

TEST(PoolWaitsTest, ReadersDoNotStarveANewGeneration) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  EXPECT_OK(program.Write(slot, 4));
  Pool::Generation generation;
  EXPECT_TRUE(EndsBesideReaders(pool.get(), program, slot, [&] { return pool->NewGeneration(&generation); }));
}

TEST(PoolWaitsTest, ReadersDoNotStarveAView) {
  auto pool = MakePool(SmallGeometry(Layout::kPerLayer), 32);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  EXPECT_OK(program.Write(slot, 4));
  for (const std::int32_t viewed : {slot, -1}) {
    EXPECT_TRUE(EndsBesideReaders(pool.get(), program, slot, [&] { return pool->AddView(0, viewed); })) << viewed;
    pool->RemoveView(viewed);
  }
}

TEST(PoolWaitsTest, AViewThatWaitsBlocksNobody) {
  auto pool = MakePool(SmallGeometry(Layout::kPerLayer), 64);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  Reader reader(&program, slot);
  std::future<Status> view = std::async(std::launch::async, [&] { return pool->AddView(0, slot); });
  std::this_thread::sleep_for(milliseconds(20));
  std::future<void> others = std::async(std::launch::async, [&] {
    static_cast<void>(pool->Numbers());
    static_cast<void>(pool->Rows());
    EXPECT_OK(pool->Acquire({16}).status);
  });
  EXPECT_EQ(others.wait_for(seconds(10)), std::future_status::ready);
  EXPECT_EQ(view.wait_for(seconds(0)), std::future_status::timeout);
  reader.End();
  EXPECT_OK(view.get());
  pool->RemoveView(slot);
}

TEST(PoolWaitsTest, WaitsAreInterrupted) {
  auto pool = MakePool(SmallGeometry(Layout::kPerLayer), 64);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  Reader reader(&program, slot);
  int asked = 0;
  const auto stop = [&] {
    static_cast<void>(pool->Numbers());  // no lock is held
    return ++asked % 2 != 0;
  };
  Pool::Generation generation;
  EXPECT_TRUE(Mentions(pool->NewGeneration(&generation, stop), "cache: interrupted"));
  EXPECT_TRUE(Mentions(pool->AddView(0, slot, stop), "view: interrupted"));
  EXPECT_EQ(asked, 4);
  EXPECT_EQ(pool->Rows()[0].views, 0);
  {
    // The gate is open again, and the generation has not changed.
    PinnedSlots pinned;
    program.SetEpoch(program.cache().epoch + 1);  // the reader's epoch
    EXPECT_OK(program.Begin(slot, 1, 1, true, &pinned));
  }
  EXPECT_TRUE(Mentions(pool->Close(stop), "close: interrupted"));
  EXPECT_TRUE(Mentions(pool->Acquire({16}).status, "closed"));
  reader.End();
  pool->Close();
}

TEST(PoolWaitsTest, MappingHandlersWaitAtTheGateToo) {
  auto pool = MakePool(SmallGeometry(Layout::kPerLayer), 64);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  const std::int32_t other = program.Acquire(16);
  Reader reader(&program, slot);
  program.SetEpoch(program.cache().epoch + 1);  // the reader's epoch
  std::future<Status> view = std::async(std::launch::async, [&] { return pool->AddView(0, slot); });
  std::this_thread::sleep_for(milliseconds(20));
  std::future<Status> mapped = std::async(std::launch::async, [&] {
    bool ok = false;
    Status status = program.Map(other, 64, &ok);
    EXPECT_TRUE(ok);
    return status;
  });
  std::this_thread::sleep_for(milliseconds(300));  // the gate opens between pieces, so it may be done by now
  reader.End();
  EXPECT_OK(view.get());
  EXPECT_OK(mapped.get());
  pool->RemoveView(slot);
}

}  // namespace
}  // namespace kvpage::testing
