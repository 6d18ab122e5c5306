// A pool's blocks are moved without affecting contents, references, the prefix index or programs in flight.
#include <gtest/gtest.h>

#include <cstdint>
#include <fstream>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/relocation_util.h"

namespace kvpage::testing {
namespace {

// Returns this process's mappings of pool memory, without the windows.
std::int64_t SystemMappings() {
  std::int64_t count = 0;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) count += line.find("memfd:jax_kvpage") != std::string::npos;
  return count;
}

TEST_P(RelocationTest, ParkedSlotsBecomeOneMappingInEachRange) {
  Make();
  const std::int64_t before = SystemMappings();
  Report report;
  EXPECT_OK(Relocate(&report));
  EXPECT_EQ(report.mappings_before, 12 * ranges_);
  EXPECT_EQ(report.mappings_after, 2 * ranges_);
  EXPECT_EQ(pool_->Numbers().memory_mappings, 2 * ranges_);
  EXPECT_EQ(SystemMappings(), before - 10 * ranges_ + 1) << "the window is one more";
  EXPECT_GT(report.blocks_moved, 0);
  EXPECT_EQ(report.bytes_copied, report.blocks_moved * 4096);
  EXPECT_TRUE(Sound());
  for (const std::int32_t id : {1, 2}) {
    EXPECT_TRUE(Holds(slots_[id - 1], 96, id));
    EXPECT_EQ(Found(id), 96);
    EXPECT_EQ(Borrow(id), slots_[id - 1]) << "it is adopted as before";
  }
  for (const std::int32_t id : {1, 2}) Write(slots_[id - 1], 16, id);  // blocks mapped for writing still are
  EXPECT_OK(Relocate(&report));
  Finish();
}

TEST_P(RelocationTest, AnOrderedPoolIsLeftAlone) {
  Make();
  EXPECT_OK(Relocate());
  const std::int64_t calls = pool_->Numbers().system_calls;
  Report report;
  EXPECT_OK(Relocate(&report));
  EXPECT_EQ(report.blocks_moved, 0);
  EXPECT_EQ(pool_->Numbers().system_calls, calls);
}

TEST_P(RelocationTest, BytesAndSlotsAreBounds) {
  Make();
  Report report;
  EXPECT_OK(Relocate(&report, {}, 3 * 4096));
  EXPECT_LE(report.bytes_copied, 3 * 4096);
  EXPECT_OK(Relocate(&report, {slots_[1]}));
  BlockReferences map;
  EXPECT_TRUE(Holds(slots_[0], 96, 1) && Holds(slots_[1], 96, 2));
  EXPECT_TRUE(Mentions(Relocate(nullptr, {kSlots}), "slot 4 does not exist"));
  EXPECT_TRUE(Mentions(Relocate(nullptr, {-1}), "slot -1 does not exist"));
  EXPECT_TRUE(Sound());
  pool_->Close();
  EXPECT_EQ(Relocate().reason(), Reason::kClosed);
}

TEST_P(RelocationTest, AFullPoolStaysAsItIsAndOneFreeBlockIsEnough) {
  Make(12);
  Report report;
  EXPECT_OK(Relocate(&report));
  EXPECT_EQ(report.blocks_moved, 0);
  Make(13);
  EXPECT_OK(Relocate(&report));
  EXPECT_LE(report.mappings_after, 2 * ranges_ + 1);
  EXPECT_TRUE(Holds(slots_[0], 96, 1) && Holds(slots_[1], 96, 2) && Sound());
  Finish();
}

TEST_P(RelocationTest, WhatRunningSlotsReadMovesAndWhatTheyWriteStays) {
  Make();
  // New slots borrow both sequences, and write after what they found.
  EXPECT_EQ(Borrow(1), slots_[0]);
  Write(slots_[0], 16, 1);
  const std::int32_t fork = program_->Fork(slots_[0]);
  Write(fork, 16, 1);
  BlockReferences before, after;
  EXPECT_OK(pool_->BlockMap(slots_[0], &before));
  Report report;
  EXPECT_OK(Relocate(&report));
  EXPECT_OK(pool_->BlockMap(slots_[0], &after));
  EXPECT_EQ(before, after) << "its occupant may write them";
  program_->Release(slots_[0]);
  EXPECT_OK(Relocate(&report));
  EXPECT_LT(report.mappings_after, report.mappings_before);
  EXPECT_TRUE(Sound());
  EXPECT_TRUE(Holds(fork, 128, 1));
  EXPECT_TRUE(Holds(slots_[1], 96, 2));
  program_->Truncate(fork, 40);  // copies a block that has moved
  Write(fork, 30, 1);
  EXPECT_TRUE(Holds(fork, 70, 1));
  EXPECT_EQ(Found(1), 96);
  EXPECT_TRUE(Sound());
  Finish();
}

TEST_P(RelocationTest, CachedBlocksWithoutASlot) {
  Make(32);
  // Four requests that write take all slots: the slots' blocks go, and the index keeps its own.
  std::vector<std::int32_t> others;
  for (int i = 0; i < kSlots; ++i) others.push_back(program_->Acquire(16));
  for (const std::int32_t slot : others) program_->Release(slot);
  EXPECT_EQ(pool_->Numbers().blocks_cached, 12 * ranges_);
  Report report;
  EXPECT_OK(Relocate(&report));
  EXPECT_GT(report.blocks_moved, 0);
  EXPECT_TRUE(Sound());
  for (const std::int32_t id : {1, 2}) EXPECT_EQ(Found(id), 96);
  const std::int64_t calls = pool_->Numbers().system_calls;
  Borrow(1);
  EXPECT_LE(pool_->Numbers().system_calls - calls, 3 * ranges_) << "one call maps a whole range; others empty the slot";
  Borrow(2);
  EXPECT_TRUE(Sound());
  Finish();
}

// Sequences with common first blocks are still read together, as are forks made later.
TEST_P(RelocationTest, WhatIsSharedIsStillKnown) {
  const auto common = [&](std::int32_t a, std::int32_t b) {
    SharedPrefixes found;
    pool_->shared_runs().Find({{a, 0, 1, 96}, {b, 0, 1, 96}}, &found);
    return found.empty() ? 0 : static_cast<std::int64_t>(found.common[1]);
  };
  Make();
  Borrow(2);
  const std::int32_t fork = program_->Fork(slots_[1]);
  program_->Release(slots_[1]);
  Report report;
  EXPECT_OK(Relocate(&report));
  EXPECT_GT(report.blocks_moved, 6 * ranges_) << "of both sequences";
  const std::int32_t later = program_->Fork(fork);
  EXPECT_EQ(common(fork, later), 96);
  program_->Release(later);
  // The first fork of a sequence is recognized by the slot that has written it.
  const std::int32_t writer = Borrow(1);
  EXPECT_EQ(writer, slots_[0]);
  EXPECT_EQ(common(writer, program_->Fork(writer)), 96);
  EXPECT_TRUE(Sound());
  Finish();
}

// Handlers that started earlier and address blocks by number find them until they end.
TEST_P(RelocationTest, AReaderByNumberKeepsItsBlocks) {
  Make();
  Borrow(1);
  const std::int32_t fork = program_->Fork(slots_[0]);
  program_->Release(slots_[0]);
  const std::int32_t offsets[] = {0, 1};
  std::vector<std::int32_t> lengths(program_->cache().lengths, program_->cache().lengths + kSlots);
  --lengths[fork];
  CacheRef cache = program_->cache();
  cache.lengths = lengths.data();
  TableCall call;
  std::optional<PinnedSlots> pinned(std::in_place);
  EXPECT_OK(pool_->Begin("paged_attention", cache, {&fork, 1, offsets, 1}, 1, false, &*pinned, &call));
  Report report;
  EXPECT_OK(Relocate(&report));
  EXPECT_GT(report.blocks_moved, 0);
  // Overwrite whatever is free now.
  const Claim claim = pool_->Acquire({128});
  EXPECT_OK(claim.status);
  EXPECT_OK(program_->Occupy(claim.slots[0]));
  Write(claim.slots[0], 128, 5);
  for (std::int64_t token = 0; token < 96; ++token) {
    for (const int kv : {0, 1}) {
      EXPECT_EQ(*reinterpret_cast<const float*>(call.view.At(0, token, 1, kv, 0)), 1000.0f + static_cast<float>(token));
    }
  }
  EXPECT_TRUE(Sound());
  pinned.reset();
  EXPECT_TRUE(Holds(fork, 96, 1));
  EXPECT_TRUE(Sound());
  Finish();
}

// Programs start, read and write while a block is being copied, and relocation does not wait for them.
TEST_P(RelocationTest, NobodyWaits) {
  Make();
  const std::int32_t running = program_->Acquire(40);
  Write(running, 20, 3);
  PinnedSlots in_flight;
  EXPECT_OK(program_->Begin(running, 1, 0, true, &in_flight));
  for (const Verb during : {Verb::kCopy, Verb::kExchange}) {
    bool ran = false;
    vmm_->Before(during, [&] {
      std::thread([&] {
        PinnedSlots pinned;
        const std::int32_t offsets[] = {0, 1};
        std::vector<std::int32_t> lengths(program_->cache().lengths, program_->cache().lengths + kSlots);
        --lengths[running];
        CacheRef cache = program_->cache();
        cache.lengths = lengths.data();
        EXPECT_OK(pool_->Begin("paged_attention", cache, {&running, 1, offsets, 1}, 1, false, &pinned));
        ran = true;
      }).join();
    });
    EXPECT_OK(Relocate(nullptr, {slots_[during == Verb::kCopy ? 0 : 1]}));
    EXPECT_TRUE(ran);
  }
  EXPECT_EQ(pool_->Numbers().waits, 0);
  EXPECT_TRUE(Holds(slots_[0], 96, 1) && Holds(slots_[1], 96, 2) && Holds(running, 20, 3));
}

TEST_P(RelocationTest, AFailureLeavesEveryBlockInPlace) {
  for (const Verb verb : {Verb::kCreate, Verb::kCopy, Verb::kExchange}) {
    int call = 0;
    for (bool failed = true; failed; ++call) {
      Make(20);
      const std::int32_t first = Borrow(1), fork = program_->Fork(first);
      program_->Release(first);
      std::int64_t freed = 0;
      if (verb == Verb::kCreate) {
        EXPECT_OK(pool_->Trim(&freed));
      }
      const PoolNumbers before = pool_->Numbers();
      vmm_->FailAt(verb, call);
      const Status status = Relocate();
      failed = vmm_->failed();
      vmm_->FailAt(Verb::kNone, 0);
      EXPECT_EQ(status.ok(), !failed) << call;
      EXPECT_TRUE(Sound()) << call;
      EXPECT_TRUE(Holds(fork, 96, 1)) << call;
      const PoolNumbers after = pool_->Numbers();
      EXPECT_EQ(after.blocks_free, before.blocks_free) << call;
      EXPECT_EQ(after.blocks_cached, before.blocks_cached) << call;
      EXPECT_EQ(after.physical_bytes, before.physical_bytes) << call;
      if (verb == Verb::kExchange) {  // would show a mapping left at the block's destination
        const std::int32_t other = program_->Acquire(128);
        Write(other, 128, 5);
        EXPECT_TRUE(Holds(fork, 96, 1) && Holds(first, 96, 1)) << call;
        program_->Release(other);
      }
      EXPECT_OK(Relocate());
      EXPECT_TRUE(Sound()) << call;
      EXPECT_TRUE(Holds(fork, 96, 1)) << call;
      if (verb == Verb::kCreate) continue;  // the other sequence was trimmed
      EXPECT_TRUE(Holds(slots_[1], 96, 2)) << call;
      EXPECT_EQ(Found(2), 96) << call;
    }
    EXPECT_GT(call, 1) << "no call of this verb";
  }
}

// Random requests, forks, truncations and releases, with relocations in between.
TEST_P(RelocationTest, RandomRequests) {
  std::uint64_t random = 1;
  const auto pick = [&](std::uint64_t n) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::int32_t>((random >> 33) % n);
  };
  Make(20);
  std::int32_t ids[kSlots] = {};  // the ids that slots hold; 0: free
  std::int64_t moved = 0;
  for (int round = 0; round < 600 && !HasFailure(); ++round) {
    const std::int32_t slot = pick(kSlots);
    if (ids[slot] == 0) {
      const std::int32_t id = 1 + pick(3);
      const Claim claim = pool_->AcquirePrefix({{Ids(1 + pick(100), id), 0}}, {});
      if (claim.status.ok()) {
        EXPECT_OK(program_->RunPrefix(claim));
        ids[claim.slots[0]] = id;
      }
    } else if (pick(4) == 0) {
      program_->Release(slot);
      ids[slot] = 0;
    } else if (pick(4) == 0) {
      const Claim claim = pool_->Fork("fork", {{slot, -1}}, {});
      if (claim.status.ok()) {
        EXPECT_OK(program_->RunFork(claim.slots[0], slot, static_cast<std::int32_t>(claim.tokens[0])));
        ids[claim.slots[0]] = ids[slot];
      }
    } else if (pick(4) == 0) {
      const std::int32_t tokens = pick(program_->length(slot) + 1);
      if (pool_->Truncate({slot}, {tokens}).status.ok()) {
        EXPECT_OK(program_->RunTruncate(slot, tokens));
      }
    } else {
      const std::int32_t count = std::min(1 + pick(30), 128 - program_->length(slot));
      if (count > 0 && pool_->Extend({slot}, {program_->length(slot) + count}).status.ok())
        Write(slot, count, ids[slot]);
    }
    Report report;
    EXPECT_OK(Relocate(&report, {}, pick(2) == 0 ? kEverything : 4096 * pick(8)));
    moved += report.blocks_moved;
    EXPECT_TRUE(Sound()) << round;
    for (std::int32_t s = 0; s < kSlots; ++s) {
      EXPECT_TRUE(ids[s] == 0 || Holds(s, program_->length(s), ids[s])) << round;
    }
  }
  EXPECT_GT(moved, 100);
  Finish();
}

INSTANTIATE_TEST_SUITE_P(Layouts, RelocationTest, ::testing::Values(Layout::kFused, Layout::kPerLayer));

}  // namespace
}  // namespace kvpage::testing
