// The arena's accounts when slots share blocks. The pool's calls for this are tested in sharing_test.cc.
#include "cache/arena.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/pool_util.h"

namespace kvpage::testing {
namespace {

using Classes = std::vector<std::int8_t>;
using Missing = std::vector<std::vector<std::int64_t>>;

// The three classes that `stats` distinguishes.
constexpr int kNumClasses = 3;

std::unique_ptr<Arena> MakeArena(const Geometry& geometry, std::int64_t blocks) {
  std::unique_ptr<Arena> arena;
  EXPECT_OK(Arena::Make(geometry, blocks, MakeVmm(geometry), &arena));
  return arena;
}

// Slot 0 has three logical blocks; slot 1 shares its first two and has one more.
struct Shared {
  explicit Shared(Layout layout) : geometry(SmallGeometry(layout)), ranges(geometry.num_ranges()) {
    arena = MakeArena(geometry, 8 * ranges);
    EXPECT_OK(arena->Grow(0, 3));
    EXPECT_OK(arena->Alias(0, 1, 2));
    EXPECT_OK(arena->Grow(1, 3));
  }
  const Geometry geometry;
  const std::int64_t ranges;
  std::unique_ptr<Arena> arena;
};

TEST(ArenaTest, ABlockMappedTwiceIsOneBlock) {
  for (const Layout layout : {Layout::kFused, Layout::kPerLayer}) {
    const Shared s(layout);
    EXPECT_EQ(s.arena->pool().num_used(), 4 * s.ranges);
    EXPECT_EQ(s.arena->pool().num_shared(), 2 * s.ranges);
    EXPECT_EQ(s.arena->mappings(0) + s.arena->mappings(1), 6 * s.ranges);
    EXPECT_EQ(s.arena->pool().num_free(), 4 * s.ranges);
    const KVView view = s.geometry.View(s.arena->base());
    std::memset(view.At(0, 20, 1, 1, 0), 42, 8);
    EXPECT_EQ(static_cast<int>(*view.At(1, 20, 1, 1, 0)), 42);
    std::memset(view.At(0, 40, 1, 1, 0), 7, 8);
    std::memset(view.At(1, 40, 1, 1, 0), 8, 8);
    EXPECT_EQ(static_cast<int>(*view.At(0, 40, 1, 1, 0)), 7) << "the third block is not shared";
  }
}

TEST(ArenaTest, EachBlockCountsInOneClass) {
  const Shared s(Layout::kPerLayer);
  EXPECT_OK(s.arena->Grow(2, 1));
  using Counts = std::vector<std::int64_t>;
  const std::int64_t r = s.ranges;
  EXPECT_TRUE((s.arena->CountByClass(Classes{0, 0, 0, 0}, kNumClasses) == Counts{5 * r, 0, 0}));
  EXPECT_TRUE((s.arena->CountByClass(Classes{0, 2, 1, 2}, kNumClasses) == Counts{3 * r, r, r}));
  EXPECT_TRUE((s.arena->CountByClass(Classes{2, 1, 0, 2}, kNumClasses) == Counts{r, 3 * r, r}));
  EXPECT_TRUE((s.arena->CountByClass(Classes{2, 2, 2, 2}, kNumClasses) == Counts{0, 0, 5 * r}));
}

TEST(ArenaTest, ABlockComesFreeWithItsLastMapping) {
  const Shared s(Layout::kPerLayer);
  EXPECT_EQ(s.arena->FreedBy({0}), s.ranges) << "two of the three are still mapped by slot 1";
  EXPECT_EQ(s.arena->FreedBy({1}), s.ranges);
  EXPECT_EQ(s.arena->FreedBy({0, 1}), 4 * s.ranges);
  EXPECT_OK(s.arena->Shrink(0, 0));
  EXPECT_EQ(s.arena->pool().num_used(), 3 * s.ranges);
  EXPECT_EQ(s.arena->pool().num_shared(), 0);
  EXPECT_EQ(s.arena->FreedBy({1}), 3 * s.ranges);
  EXPECT_OK(s.arena->Shrink(1, 0));
  EXPECT_EQ(s.arena->pool().num_free(), 8 * s.ranges);
}

TEST(ArenaTest, OnlyATailThatNobodyElseMapsCanBeMoved) {
  const Shared s(Layout::kPerLayer);
  EXPECT_EQ(s.arena->ExclusiveTail(0, 3), 1);
  EXPECT_EQ(s.arena->ExclusiveTail(1, 3), 1);
  EXPECT_OK(s.arena->Shrink(1, 2));
  EXPECT_EQ(s.arena->ExclusiveTail(1, 2), 0) << "its last block is shared";
  EXPECT_OK(s.arena->Shrink(1, 1));
  EXPECT_EQ(s.arena->ExclusiveTail(0, 3), 2);
  EXPECT_EQ(s.arena->ExclusiveTail(0, 1), 1) << "never more than was asked for";
  EXPECT_OK(s.arena->Shrink(1, 0));
  EXPECT_EQ(s.arena->ExclusiveTail(0, 3), 3);
}

TEST(ArenaTest, WhatIsSharedSurvivesItsFirstOwner) {
  const Shared s(Layout::kFused);
  const KVView view = s.geometry.View(s.arena->base());
  std::memset(view.At(0, 17, 0, 0, 0), 5, 8);
  EXPECT_OK(s.arena->Shrink(0, 0));
  EXPECT_EQ(s.arena->Trim(), 1) << "only the block that slot 1 does not map";
  EXPECT_EQ(static_cast<int>(*view.At(1, 17, 0, 0, 0)), 5);
  EXPECT_EQ(s.arena->vmm().PhysicalBytes(), 3 * s.geometry.block_bytes);
}

TEST(ArenaTest, ABlockMappedByThreeSlots) {
  const Shared s(Layout::kFused);
  EXPECT_OK(s.arena->Alias(1, 2, 1));
  EXPECT_EQ(s.arena->pool().num_shared(), 2) << "two shared blocks, one of them three times";
  EXPECT_EQ(s.arena->pool().references(s.arena->block_map(2, 0)[0]), 3);
  EXPECT_OK(s.arena->Shrink(1, 0));
  EXPECT_EQ(s.arena->pool().num_shared(), 1);
  EXPECT_OK(s.arena->Shrink(2, 0));
  EXPECT_EQ(s.arena->pool().num_shared(), 0);
  EXPECT_OK(s.arena->Shrink(0, 0));
  EXPECT_EQ(s.arena->pool().num_used(), 0);
}

TEST(ArenaTest, OfSeveralSharersTheLastNeedsNoCopy) {
  const Shared s(Layout::kPerLayer);  // slots 0 and 1 share two blocks
  EXPECT_EQ(s.arena->Missing({0, 1}, {0, 0}), (Missing{{0, 1}, {}}));
  EXPECT_EQ(s.arena->Missing({1, 0}, {0, 1}), (Missing{{0, 1}, {}}));
  EXPECT_EQ(s.arena->Missing({0, 1}, {1, 0}), (Missing{{1}, {0}})) << "slot 0 keeps its first block";
  EXPECT_EQ(s.arena->Missing({0, 1}, {0, 0}, nullptr, /*hold=*/true), (Missing{{0, 1}, {0, 1}}));
  EXPECT_OK(s.arena->SetAside(0, {1}));
  EXPECT_EQ(s.arena->Missing({0, 1}, {0, 0}), (Missing{{0}, {}}));
  EXPECT_OK(s.arena->Alias(0, 2, 1));
  EXPECT_EQ(s.arena->Missing({0, 1}, {0, 0}), (Missing{{0}, {0}})) << "slot 2 needs the first one";
  EXPECT_EQ(s.arena->Missing({2, 0, 1}, {0, 0, 0}), (Missing{{0}, {0}, {}}));
}

TEST(ArenaTest, ASeparatedBlockIsACopy) {
  for (const Layout layout : {Layout::kFused, Layout::kPerLayer}) {
    for (const int slot : {0, 1}) {
      const Shared s(layout);
      const KVView view = s.geometry.View(s.arena->base());
      std::memset(view.At(0, 20, 1, 1, 0), 42, 8);
      EXPECT_EQ(s.arena->Missing({slot}, {1}), Missing{{1}});
      EXPECT_EQ(s.arena->Separate(slot, 1).code(), Code::kInternal) << "nothing is set aside";
      EXPECT_OK(s.arena->SetAside(slot, {1}));
      EXPECT_EQ(s.arena->num_set_aside(), s.ranges);
      EXPECT_EQ(s.arena->Missing({slot}, {1}), Missing{{}});
      const std::int64_t promised = s.arena->extra_mappings();
      EXPECT_OK(s.arena->Separate(slot, 1));
      EXPECT_LE(s.arena->extra_mappings(), promised);
      EXPECT_EQ(s.arena->num_set_aside(), 0);
      EXPECT_EQ(s.arena->pool().num_used(), 5 * s.ranges);
      EXPECT_EQ(s.arena->SharedBlocks(0), 1);
      EXPECT_EQ(s.arena->ReadOnlyBlocks(1), slot == 1 ? 1 : 2);
      EXPECT_EQ(static_cast<int>(*view.At(slot, 20, 1, 1, 0)), 42);
      std::memset(view.At(slot, 20, 1, 1, 0), 43, 8);
      EXPECT_EQ(static_cast<int>(*view.At(1 - slot, 20, 1, 1, 0)), 42);
      EXPECT_OK(s.arena->Shrink(0, 0));
      EXPECT_OK(s.arena->Shrink(1, 0));
      EXPECT_EQ(s.arena->pool().num_used(), 0);
      EXPECT_EQ(s.arena->extra_mappings(), 0);
    }
  }
}

}  // namespace
}  // namespace kvpage::testing
