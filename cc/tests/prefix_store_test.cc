// A pool's prefixes in a store: contents and accounts, and what happens when memory, files or other calls interfere.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#include "tests/expect_ok.h"
#include "tests/store_rig.h"

namespace kvpage::testing {
namespace {

using store::testing::TemporaryFolder;

struct Rig : PrefixRig {
  using PrefixRig::PrefixRig;

  prefix::Saved Save(store::BlockStore* store) {
    prefix::Saved saved;
    EXPECT_OK(pool->SavePrefixes(store, {}, {}, &saved));
    return saved;
  }
  prefix::Loaded Load(store::BlockStore* store) {
    prefix::Loaded loaded;
    EXPECT_OK(pool->LoadPrefixes(store, {}, &loaded));
    EXPECT_TRUE(AddsUp(pool.get()));
    return loaded;
  }
};

std::unique_ptr<store::BlockStore> Open(const TemporaryFolder& folder, store::StoreOptions options = {}) {
  options.refresh_seconds = 0.01;
  return store::testing::OpenStore(folder, options);
}

class PrefixStoreTest : public ::testing::TestWithParam<Layout> {
 protected:
  const TemporaryFolder folder_;
};

TEST_P(PrefixStoreTest, AnotherPoolHasWhatWasSaved) {
  Rig first(GetParam()), second(GetParam());
  first.Fill(70);
  const auto store = Open(folder_);
  EXPECT_EQ(first.Save(store.get()).written, 64);
  EXPECT_EQ(first.Save(store.get()).written, 0);
  EXPECT_EQ(second.Load(store.get()).tokens, 64);
  EXPECT_EQ(second.pool->Numbers().blocks_cached, 4 * second.geometry.num_ranges());
  const Claim claim = second.program->AcquirePrefix(Sevens(66, 8));
  ASSERT_EQ(claim.tokens[0], 64);
  EXPECT_EQ(CountStamped(second.pool.get(), claim.slots[0], 0, 64, 1), 64);
  // Loaded blocks are read-only: the slot continues after them, and other slots still find them.
  WriteStamped(second.pool.get(), second.program.get(), claim.slots[0], 20, 3);
  const Claim again = second.program->AcquirePrefix(Sevens(66, 9));
  EXPECT_EQ(CountStamped(second.pool.get(), again.slots[0], 0, 64, 1), 64);
  EXPECT_TRUE(AddsUp(second.pool.get()));
  std::int64_t freed = 0;
  second.program->Release(claim.slots[0]);
  second.program->Release(again.slots[0]);
  ASSERT_OK(second.pool->Evict(1000, &freed));
  EXPECT_EQ(second.pool->Numbers().blocks_cached, 0);
}

TEST_P(PrefixStoreTest, WhatIsNotWrittenYetIsNotSaved) {
  Rig rig(GetParam());
  const std::int32_t slot = rig.program->AcquirePrefix(Sevens(70)).slots[0];
  ASSERT_OK(rig.pool->Commit(slot, Sevens(40)));
  const auto store = Open(folder_);
  EXPECT_EQ(rig.Save(store.get()).tokens, 0);
  EXPECT_EQ(store->Numbers().files, 0);
}

TEST_P(PrefixStoreTest, NoMemoryIsNoRoom) {
  Rig first(GetParam());
  first.Fill(70);
  const auto store = Open(folder_);
  first.Save(store.get());
  Rig small(GetParam(), 3);
  const prefix::Loaded loaded = small.Load(store.get());
  EXPECT_EQ(loaded.tokens, 48);
  EXPECT_EQ(loaded.no_room, 16);
  Rig second(GetParam());
  second.vmm->FailAt(Verb::kCreate, 0);
  EXPECT_EQ(second.Load(store.get()).no_room, 64);
  EXPECT_TRUE(second.vmm->failed());
  EXPECT_EQ(second.pool->Numbers().blocks_free, second.pool->Numbers().blocks_total);
  EXPECT_EQ(second.Load(store.get()).tokens, 64);
}

TEST_P(PrefixStoreTest, ACallerThatWaitsNoLongerLeavesNothingBehind) {
  struct SlowIo : store::FileIo {
    ssize_t Read(int fd, const iovec* parts, int count, off_t offset) override {
      if (slow) usleep(300000);
      return FileIo::Read(fd, parts, count, offset);
    }
    int Sync(int fd) override {
      if (slow) usleep(300000);
      return FileIo::Sync(fd);
    }
    std::atomic<bool> slow{false};
  };
  const auto io = std::make_shared<SlowIo>();
  store::StoreOptions options;
  options.io = io;
  const auto store = Open(folder_, options);
  Rig first(GetParam()), second(GetParam());
  first.Fill(70);
  const GoOn no = [] { return false; };
  prefix::Saved saved;
  io->slow = true;
  EXPECT_EQ(first.pool->SavePrefixes(store.get(), {}, no, &saved).code(), Code::kFailedPrecondition);
  io->slow = false;
  first.Save(store.get());
  io->slow = true;
  prefix::Loaded loaded;
  EXPECT_EQ(second.pool->LoadPrefixes(store.get(), no, &loaded).code(), Code::kFailedPrecondition);
  io->slow = false;
  EXPECT_TRUE(AddsUp(second.pool.get()));
  const prefix::Loaded rest = second.Load(store.get());
  EXPECT_EQ(rest.tokens + rest.present, 64);
}

TEST_P(PrefixStoreTest, AClosedStoreOrPoolIsAnError) {
  Rig rig(GetParam());
  rig.Fill(70);
  const auto store = Open(folder_);
  rig.Save(store.get());
  prefix::Saved saved;
  prefix::Loaded loaded;
  rig.pool->Close();
  EXPECT_EQ(rig.pool->SavePrefixes(store.get(), {}, {}, &saved).reason(), Reason::kClosed);
  EXPECT_EQ(rig.pool->LoadPrefixes(store.get(), {}, &loaded).reason(), Reason::kClosed);
  store->Close();
  Rig other(GetParam());
  EXPECT_EQ(other.pool->LoadPrefixes(store.get(), {}, &loaded).reason(), Reason::kClosed);
  EXPECT_EQ(other.pool->SavePrefixes(store.get(), {}, {}, &saved).reason(), Reason::kClosed);
}

// Threads save, load and evict while other threads run requests.
TEST_P(PrefixStoreTest, CallsMeet) {
  Rig rig(GetParam());
  rig.Fill(70);
  const auto store = Open(folder_);
  std::atomic<bool> ended{false};
  std::vector<std::thread> threads;
  threads.emplace_back([&] {
    prefix::Saved saved;
    while (!ended) EXPECT_OK(rig.pool->SavePrefixes(store.get(), {}, {}, &saved));
  });
  threads.emplace_back([&] {
    prefix::Loaded loaded;
    while (!ended) EXPECT_OK(rig.pool->LoadPrefixes(store.get(), {}, &loaded));
  });
  threads.emplace_back([&] {
    std::int64_t freed = 0;
    while (!ended) EXPECT_OK(rig.pool->Evict(4, &freed));
  });
  for (int i = 0; i < 30; ++i) {
    const Claim claim = rig.program->AcquirePrefix(Sevens(50 + i % 7, 8));
    ASSERT_OK(claim.status);
    const std::int64_t found = claim.tokens[0];
    EXPECT_EQ(CountStamped(rig.pool.get(), claim.slots[0], 0, found, 1), found);
    WriteStamped(rig.pool.get(), rig.program.get(), claim.slots[0], static_cast<std::int32_t>(60 - found), 1);
    rig.program->Release(claim.slots[0]);
  }
  ended = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(AddsUp(rig.pool.get()));
}

INSTANTIATE_TEST_SUITE_P(Layouts, PrefixStoreTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& info) { return info.param == Layout::kFused ? "fused" : "per_layer"; });

}  // namespace
}  // namespace kvpage::testing
