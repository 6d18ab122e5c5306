// Handlers that address blocks by number: what they see of the block table while it changes and when the page table
// fails.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/faulty_vmm.h"
#include "tests/host_verbs.h"
#include "tests/pool_util.h"
#include "tests/sharing_util.h"

namespace kvpage::testing {
namespace {

// A pool, and a program that has written 40 stamped tokens in one slot.
struct Fixture {
  explicit Fixture(Layout layout) : geometry(SmallGeometry(layout)), ranges(geometry.num_ranges()) {
    auto faulty = std::make_unique<FaultyVmm>(MakeVmm(geometry));
    vmm = faulty.get();
    pool = MakePool(geometry, 20 * ranges, {}, std::move(faulty));
    program = std::make_unique<Program>(pool.get());
    slot = program->Acquire(40);
    WriteStamped(pool.get(), program.get(), slot, 40, 1);
  }
  // Starts a handler that reads up to `tokens` tokens of each slot in one layer.
  Status Read(const std::vector<std::int32_t>& slots, std::int32_t tokens, std::int64_t layer, TableCall* call,
              PinnedSlots* pinned) {
    std::vector<std::int32_t> lengths(kSlots, -1), offsets = {0};
    for (const std::int32_t s : slots) {
      lengths[s] = tokens - 1;
      offsets.push_back(offsets.back() + 1);
    }
    CacheRef cache = program->cache();
    cache.lengths = lengths.data();
    return pool->Begin("paged_attention", cache,
                       {slots.data(), static_cast<std::int64_t>(slots.size()), offsets.data(), offsets.back()}, layer,
                       false, pinned, call);
  }
  // Counts the tokens, from the first one on, that the table shows with this stamp and their position.
  static std::int64_t Seen(const TableCall& call, std::int32_t row, std::int64_t layer, std::int64_t tokens,
                           float stamp) {
    for (std::int64_t token = 0; token < tokens; ++token) {
      for (const int kv : {0, 1}) {
        const float at = *reinterpret_cast<const float*>(call.view.At(row, token, layer, kv, 0));
        if (at != 1000 * stamp + static_cast<float>(token)) return token;
      }
    }
    return tokens;
  }
  std::int64_t Sees(std::int32_t s, std::int32_t tokens, float stamp) {
    for (std::int64_t layer = 0; layer < geometry.num_layers; ++layer) {
      TableCall call;
      PinnedSlots pinned;
      EXPECT_OK(Read({s}, tokens, layer, &call, &pinned));
      if (const std::int64_t seen = Seen(call, 0, layer, tokens, stamp); seen < tokens) return seen;
    }
    return tokens;
  }

  const Geometry geometry;
  const std::int64_t ranges;
  FaultyVmm* vmm = nullptr;
  std::shared_ptr<Pool> pool;
  std::unique_ptr<Program> program;
  std::int32_t slot = -1;
};

class BlockTableTest : public ::testing::TestWithParam<Layout> {};
INSTANTIATE_TEST_SUITE_P(Layouts, BlockTableTest, ::testing::Values(Layout::kFused, Layout::kPerLayer));

TEST_P(BlockTableTest, ShowsTheSlotsTokens) {
  Fixture f(GetParam());
  const std::int32_t other = f.program->Acquire(20);
  WriteStamped(f.pool.get(), f.program.get(), other, 20, 2);
  WriteStamped(f.pool.get(), f.program.get(), f.slot, 30, 1);  // grows behind the other slot's blocks
  EXPECT_EQ(f.Sees(f.slot, 70, 1), 70);
  EXPECT_EQ(f.Sees(other, 20, 2), 20);
  TableCall call;
  PinnedSlots pinned;
  EXPECT_OK(f.Read({other, f.slot}, 18, 1, &call, &pinned));
  EXPECT_EQ(call.sequences[1].slot, 1) << "a row for each sequence, in the order of the batch";
  EXPECT_EQ(pinned.sequences()[1].slot, f.slot);
  EXPECT_EQ(Fixture::Seen(call, 0, 1, 18, 2), 18);
  EXPECT_EQ(Fixture::Seen(call, 1, 1, 18, 1), 18);
}

TEST_P(BlockTableTest, WritesThroughTheTableAreTheSlots) {
  Fixture f(GetParam());
  EXPECT_OK(f.pool->Extend({f.slot}, {60}).status);
  const std::int32_t offsets[] = {0, 20};
  TableCall call;
  PinnedSlots pinned;
  EXPECT_OK(f.pool->Begin("update_and_attend", f.program->cache(), {&f.slot, 1, offsets, 20}, 1, true, &pinned, &call));
  for (const int kv : {0, 1}) std::memset(call.view.At(0, 55, 1, kv, 0), 42 + kv, 4);
  EXPECT_EQ(static_cast<int>(*f.pool->View().At(f.slot, 55, 1, 0, 0)), 42);
  EXPECT_EQ(static_cast<int>(*f.pool->View().At(f.slot, 55, 1, 1, 0)), 43);
}

TEST_P(BlockTableTest, FollowsForksTruncationsAndMoves) {
  Fixture f(GetParam());
  const std::int32_t fork = f.program->Fork(f.slot, 36);
  EXPECT_EQ(f.Sees(fork, 36, 1), 36);
  f.program->Truncate(fork, 20);  // makes a private copy of the second block
  WriteStamped(f.pool.get(), f.program.get(), fork, 30, 1);
  EXPECT_EQ(f.Sees(fork, 50, 1), 50);
  f.program->Truncate(f.slot, 5);
  WriteStamped(f.pool.get(), f.program.get(), f.slot, 60, 1);
  EXPECT_EQ(f.Sees(f.slot, 65, 1), 65);
  EXPECT_EQ(f.Sees(fork, 50, 1), 50);
  f.program->Release(f.slot);
  const std::int32_t next = f.program->Acquire(128);  // takes parked blocks from other slots
  WriteStamped(f.pool.get(), f.program.get(), next, 128, 3);
  EXPECT_EQ(f.Sees(next, 128, 3), 128);
  EXPECT_EQ(f.Sees(fork, 50, 1), 50);
}

TEST_P(BlockTableTest, AReaderKeepsTheBlocksThatATruncationExchanges) {
  Fixture f(GetParam());
  const std::int32_t fork = f.program->Fork(f.slot, 32);
  std::optional<PinnedSlots> pinned(std::in_place);
  TableCall call;
  EXPECT_OK(f.Read({fork}, 32, 0, &call, &*pinned));
  f.program->Truncate(fork, 8);
  f.program->Truncate(f.slot, 8);  // the only slot left that maps them: without the reader it could write there
  WriteStamped(f.pool.get(), f.program.get(), f.slot, 30, 2);
  WriteStamped(f.pool.get(), f.program.get(), fork, 30, 3);
  EXPECT_EQ(Fixture::Seen(call, 0, 0, 32, 1), 32);
  EXPECT_TRUE(AddsUp(f.pool.get()));
  const std::int64_t used = f.pool->Numbers().blocks_mapped;
  EXPECT_EQ(used, (3 + 3 + 2) * f.ranges) << "of each three, and two that the reader holds";
  pinned.reset();
  EXPECT_EQ(f.pool->Numbers().blocks_mapped, used - 2 * f.ranges);
  EXPECT_TRUE(AddsUp(f.pool.get()));
  EXPECT_EQ(f.Sees(f.slot, 8, 1), 8);
}

TEST_P(BlockTableTest, BlocksThatWereHeldAreFoundUnderPressure) {
  Fixture f(GetParam());
  const std::int32_t fork = f.program->Fork(f.slot, 32);
  {
    PinnedSlots pinned;
    TableCall call;
    EXPECT_OK(f.Read({fork}, 32, 0, &call, &pinned));
    f.program->Truncate(fork, 0);
    f.program->Release(f.slot);
    EXPECT_EQ(f.pool->Numbers().blocks_mapped, (2 + 2) * f.ranges);
    EXPECT_FALSE(f.pool->Acquire({128, 128, 64}).status.ok()) << "18 blocks: 16 are there";
  }
  EXPECT_OK(f.pool->Acquire({128, 128, 32}).status);
}

TEST_P(BlockTableTest, AWindowThatCannotBeReservedIsAnError) {
  Fixture f(GetParam());
  f.vmm->FailAt(Verb::kWindow, 0);
  TableCall call;
  PinnedSlots pinned;
  EXPECT_EQ(f.Read({f.slot}, 40, 0, &call, &pinned).code(), Code::kResourceExhausted);
  EXPECT_EQ(f.Sees(f.slot, 40, 1), 40) << "the next handler tries again";
}

TEST_P(BlockTableTest, APoolThatGrowsTakesItsWindowAlong) {
  Fixture f(GetParam());
  EXPECT_EQ(f.Sees(f.slot, 40, 1), 40);
  const std::int64_t capacity = 2 * 20 * f.ranges * f.geometry.block_bytes;
  f.vmm->FailAt(Verb::kWindow, 0);
  EXPECT_FALSE(f.pool->Resize(capacity).status.ok());
  EXPECT_EQ(f.pool->Numbers().blocks_total, 20 * f.ranges);
  EXPECT_OK(f.pool->Resize(capacity).status);
  std::vector<std::int32_t> slots;
  for (int i = 0; i < 3; ++i) {
    slots.push_back(f.program->Acquire(128));
    WriteStamped(f.pool.get(), f.program.get(), slots.back(), 128, static_cast<float>(2 + i));
  }
  for (int i = 0; i < 3; ++i) EXPECT_EQ(f.Sees(slots[i], 128, static_cast<float>(2 + i)), 128);
  EXPECT_EQ(f.Sees(f.slot, 40, 1), 40);
}

// Readers in one thread beside truncations, appends and claims in another. Also for ThreadSanitizer.
TEST_P(BlockTableTest, ReadersBesideChanges) {
  Fixture f(GetParam());
  std::atomic<bool> stop{false};
  std::thread claims([&] {
    while (!stop.load()) {
      const Claim claim = f.pool->Acquire({64});
      if (claim.status.ok()) UndoAcquire(*f.pool, claim.slots);  // its program was never queued
      std::this_thread::yield();
    }
  });
  for (int round = 0; round < 40; ++round) {
    WriteStamped(f.pool.get(), f.program.get(), f.slot, 40 - f.program->length(f.slot), 1);
    const std::int32_t fork = f.program->Fork(f.slot, 32);
    std::optional<PinnedSlots> pinned(std::in_place);
    TableCall call;
    EXPECT_OK(f.Read({fork}, 32, 1, &call, &*pinned));
    std::thread reader([&] {
      for (int i = 0; i < 20; ++i) EXPECT_EQ(Fixture::Seen(call, 0, 1, 32, 1), 32) << round;
      pinned.reset();
    });
    f.program->Truncate(fork, 8);
    f.program->Truncate(f.slot, 8);
    WriteStamped(f.pool.get(), f.program.get(), f.slot, 30, 2);
    WriteStamped(f.pool.get(), f.program.get(), fork, 30, 3);
    reader.join();
    f.program->Truncate(f.slot, 8);
    f.program->Release(fork);
  }
  stop = true;
  claims.join();
  EXPECT_TRUE(AddsUp(f.pool.get()));
}

// However the page table fails, slots and block table stay consistent.
TEST_P(BlockTableTest, FollowsWhatFailed) {
  for (const Verb verb : {Verb::kMap, Verb::kUnmap, Verb::kMove, Verb::kMapReadOnly, Verb::kRemap, Verb::kCopy}) {
    for (int call = 0; call < 12; ++call) {
      Fixture f(GetParam());
      const std::int32_t fork = f.program->Fork(f.slot, 32);
      const std::int32_t parked = f.program->Acquire(100);
      f.program->Release(parked);
      EXPECT_OK(f.pool->Truncate({fork}, {8}).status);
      f.vmm->FailAt(verb, call);
      const Status truncated = f.program->RunTruncate(fork, 8);
      const Claim more = f.pool->Acquire({128});
      const Claim forks = f.pool->Fork("fork", {{f.slot, 40}}, {});
      f.vmm->FailAt(Verb::kNone, 0);
      const std::int32_t kept = truncated.ok() ? 8 : 32;
      EXPECT_EQ(f.Sees(fork, kept, 1), kept) << static_cast<int>(verb) << " " << call;
      EXPECT_EQ(f.Sees(f.slot, 40, 1), 40) << static_cast<int>(verb) << " " << call;
      EXPECT_TRUE(AddsUp(f.pool.get())) << static_cast<int>(verb) << " " << call;
      if (more.status.ok()) {
        EXPECT_OK(f.program->Occupy(more.slots[0]));
        WriteStamped(f.pool.get(), f.program.get(), more.slots[0], 128, 4);
        EXPECT_EQ(f.Sees(more.slots[0], 128, 4), 128) << static_cast<int>(verb) << " " << call;
      }
    }
  }
}

}  // namespace
}  // namespace kvpage::testing
