// Relocation plans, carried out on an array: no block is lost, and chains become runs.
#include "cache/relocation_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

namespace kvpage {
namespace {

using Chain = RelocationTask::Chain;

// A task in which the blocks of chains are movable, those in `free` are free, and all others are fixed.
RelocationTask Task(std::int64_t blocks, std::vector<Chain> chains, const std::vector<std::int32_t>& free,
                    std::int64_t most_moves = 1000) {
  RelocationTask task;
  task.uses.assign(static_cast<std::size_t>(blocks), BlockUse::kFixed);
  for (const std::int32_t block : free) task.uses[block] = BlockUse::kFree;
  for (const Chain& chain : chains) {
    for (const std::int32_t block : chain.blocks) task.uses[block] = BlockUse::kMovable;
  }
  task.chains = std::move(chains);
  task.most_moves = most_moves;
  return task;
}

// Carries out a plan, each move of which must be possible; returns the places of the chains' blocks.
std::vector<std::vector<std::int32_t>> Carry(const RelocationTask& task, const std::vector<PlannedMove>& moves) {
  std::vector<BlockUse> uses = task.uses;
  std::vector<std::vector<std::int32_t>> places;
  for (const Chain& chain : task.chains) places.push_back(chain.blocks);
  EXPECT_LE(static_cast<std::int64_t>(moves.size()), task.most_moves);
  for (const PlannedMove& move : moves) {
    EXPECT_EQ(places[move.chain][move.index], move.from);
    EXPECT_EQ(uses[move.from], BlockUse::kMovable);
    EXPECT_EQ(uses[move.to], BlockUse::kFree);
    std::swap(uses[move.from], uses[move.to]);
    places[move.chain][move.index] = move.to;
  }
  return places;
}

std::int64_t Runs(const std::vector<std::int32_t>& blocks) {
  std::int64_t runs = 0;
  for (std::size_t i = 0; i < blocks.size(); ++i) runs += i == 0 || blocks[i] != blocks[i - 1] + 1;
  return runs;
}

TEST(RelocationPlanTest, WhatIsInOrderStays) {
  EXPECT_TRUE(PlanRelocation(Task(8, {{{2, 3, 4}}, {{0}}}, {6, 7})).empty());
  EXPECT_TRUE(PlanRelocation(Task(8, {}, {6, 7})).empty());
}

TEST(RelocationPlanTest, TheWindowWithMostInPlaceIsTaken) {
  const RelocationTask task = Task(16, {{{1, 2, 3, 9}}}, {4, 10, 11, 12, 13, 14});
  const std::vector<PlannedMove> moves = PlanRelocation(task);
  ASSERT_EQ(moves.size(), std::size_t{1});
  EXPECT_EQ(moves[0].to, 4);
}

TEST(RelocationPlanTest, OneFreeBlockIsEnough) {
  const RelocationTask task = Task(9, {{{0, 2, 4, 6}}, {{1, 3, 5, 7}}}, {8});
  for (const auto& places : Carry(task, PlanRelocation(task))) EXPECT_EQ(Runs(places), 1);
}

TEST(RelocationPlanTest, WhatIsInOrderMakesNoRoom) {
  const RelocationTask task = Task(9, {{{8, 0, 7}}, {{2, 3, 4, 5}}}, {1, 6});
  EXPECT_EQ(Carry(task, PlanRelocation(task))[1], task.chains[1].blocks);
}

TEST(RelocationPlanTest, WithoutAFreeBlockNothingMoves) {
  EXPECT_TRUE(PlanRelocation(Task(8, {{{0, 2, 4, 6}}, {{1, 3, 5, 7}}}, {})).empty());
}

TEST(RelocationPlanTest, FixedBlocksAreGoneAround) {
  // There is no window for six blocks, but two for three.
  const RelocationTask task = Task(13, {{{0, 2, 4, 6, 8, 10}}}, {1, 3, 5, 7, 9});
  const std::vector<PlannedMove> moves = PlanRelocation(task);
  EXPECT_EQ(Runs(Carry(task, moves)[0]), 1);
  RelocationTask divided = task;
  divided.uses[5] = BlockUse::kFixed;
  EXPECT_EQ(Runs(Carry(divided, PlanRelocation(divided))[0]), 2);
}

TEST(RelocationPlanTest, FewMovesDoAPart) {
  std::vector<std::int32_t> scattered, free;
  for (std::int32_t i = 0; i < 64; ++i) (i % 2 == 0 ? scattered : free).push_back(i);
  for (const std::int64_t most : {0, 1, 5, 20}) {
    const RelocationTask task = Task(64, {{scattered}}, free, most);
    const std::vector<PlannedMove> moves = PlanRelocation(task);
    const std::int64_t runs = Runs(Carry(task, moves)[0]);
    EXPECT_LE(runs, most < 5 ? 32 : 31) << most;
    EXPECT_EQ(moves.empty(), most == 0 || runs == 32) << most;
  }
}

TEST(RelocationPlanTest, ALongRunIsNotCopiedForOneMapping) {
  std::vector<std::int32_t> blocks, free;
  for (std::int32_t i = 0; i < 100; ++i) blocks.push_back(i);
  blocks.push_back(150);
  for (std::int32_t i = 200; i < 400; ++i) free.push_back(i);
  EXPECT_TRUE(PlanRelocation(Task(400, {{blocks}}, free)).empty());
}

TEST(RelocationPlanTest, WindowsAreAligned) {
  const RelocationTask task =
      Task(32, {{{1, 2, 3, 4, 5, 6, 7, 8}, 8, 3}}, {16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26});
  EXPECT_EQ(Carry(task, PlanRelocation(task))[0][0], 19);
}

// Chains that are scattered over the file, with fixed and free blocks in between.
TEST(RelocationPlanTest, RandomPoolsBecomeOrdered) {
  std::mt19937 random(1);
  std::int64_t before = 0, after = 0;
  for (int round = 0; round < 200; ++round) {
    const int blocks = std::uniform_int_distribution<int>(4, 200)(random);
    std::vector<std::int32_t> order(blocks);
    for (int i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    std::vector<Chain> chains;
    std::vector<std::int32_t> free;
    for (std::size_t i = 0; i < order.size();) {
      const int kind = std::uniform_int_distribution<int>(0, 5)(random);
      const std::size_t count = std::min<std::size_t>(1 + random() % 20, order.size() - i);
      const std::vector<std::int32_t> part(order.begin() + i, order.begin() + i + count);
      if (kind <= 3) chains.push_back({part});
      if (kind == 4) free.insert(free.end(), part.begin(), part.end());
      i += count;  // otherwise fixed
    }
    const RelocationTask task = Task(blocks, chains, free, random() % 300);
    const auto places = Carry(task, PlanRelocation(task));
    for (std::size_t i = 0; i < places.size(); ++i) {
      before += Runs(chains[i].blocks) - 1;
      after += Runs(places[i]) - 1;
    }
    ASSERT_FALSE(HasFailure()) << "round " << round;
  }
  EXPECT_LT(after, before / 2);
}

}  // namespace
}  // namespace kvpage
