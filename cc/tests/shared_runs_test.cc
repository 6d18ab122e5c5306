// What slots have in common over the life of a pool: forks, truncations, reorders, releases.
#include "cache/shared_runs.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/pool_util.h"
#include "tests/sharing_util.h"

namespace kvpage::testing {
namespace {

constexpr std::int32_t kTokens = 48;  // three blocks

class SharedRunsTest : public ::testing::TestWithParam<Layout> {
 protected:
  SharedRunsTest() : pool_(MakePool(SmallGeometry(GetParam()), 96)), program_(pool_.get()) {
    donor_ = program_.Acquire(kTokens);
    WriteStamped(pool_.get(), &program_, donor_, kTokens, 1);
  }

  static std::vector<Sequence> Of(const std::vector<std::int32_t>& slots) {
    std::vector<Sequence> sequences;
    for (const std::int32_t slot : slots) sequences.push_back({slot, 0, 1, kTokens});
    return sequences;
  }
  // Returns how many tokens two slots have in common.
  std::int64_t Common(std::int32_t a, std::int32_t b) const {
    SharedPrefixes found;
    pool_->shared_runs().Find(Of({a, b}), &found);
    return found.empty() ? 0 : found.common[1];
  }

  const std::shared_ptr<Pool> pool_;
  Program program_;
  std::int32_t donor_ = -1;
};

TEST_P(SharedRunsTest, ForksAndTheirForks) {
  EXPECT_EQ(Common(donor_, donor_), 0) << "nobody else has its blocks";
  const std::int32_t child = program_.Fork(donor_);
  const std::int32_t grandchild = program_.Fork(child, 40);
  EXPECT_EQ(Common(donor_, child), 48);
  EXPECT_EQ(Common(donor_, grandchild), 32) << "whole blocks";
  WriteStamped(pool_.get(), &program_, child, 32, 2);
  WriteStamped(pool_.get(), &program_, donor_, 32, 3);
  EXPECT_EQ(Common(donor_, child), 48);
  const std::int32_t last = program_.Fork(child);
  EXPECT_EQ(Common(child, last), 80);
  EXPECT_EQ(Common(donor_, last), 48);
  SharedPrefixes all;
  pool_->shared_runs().Find(Of({donor_, child, grandchild, last}), &all);
  EXPECT_EQ(all.order.size(), 4U);
  std::map<std::int64_t, int> common;
  for (const std::int64_t tokens : all.common) ++common[tokens];
  EXPECT_EQ(common, (std::map<std::int64_t, int>{{0, 1}, {32, 1}, {48, 1}, {80, 1}}));
}

TEST_P(SharedRunsTest, ATruncationCutsWhenItRuns) {
  const std::int32_t a = program_.Fork(donor_), b = program_.Fork(donor_);
  SharedPrefixes found;
  const std::uint64_t at = pool_->shared_runs().Find(Of({donor_, a, b}), &found);
  EXPECT_OK(pool_->Truncate({donor_}, {20}).status);
  EXPECT_EQ(Common(donor_, a), 48);
  EXPECT_FALSE(pool_->shared_runs().Changed(Of({donor_, a, b}), at));
  EXPECT_OK(program_.RunTruncate(donor_, 20));
  EXPECT_EQ(Common(donor_, a), 16);
  EXPECT_EQ(Common(a, b), 48);
  EXPECT_TRUE(pool_->shared_runs().Changed(Of({donor_, a, b}), at));
  EXPECT_FALSE(pool_->shared_runs().Changed(Of({a, b}), at));
  // New tokens replace the old ones; what is forked from then on is shared again.
  WriteStamped(pool_.get(), &program_, donor_, 28, 2);
  const std::int32_t c = program_.Fork(donor_);
  EXPECT_EQ(Common(donor_, c), 48);
  EXPECT_EQ(Common(a, c), 16);
}

TEST_P(SharedRunsTest, AReleasedSlotSharesNothingAnyMore) {
  const std::int32_t fork = program_.Fork(donor_);
  program_.Release(fork);
  std::vector<std::int32_t> slots;
  while (slots.size() < 3) slots.push_back(program_.Acquire(kTokens));
  for (const std::int32_t slot : slots) EXPECT_EQ(Common(donor_, slot), 0) << (slot == fork);
  program_.Release(donor_);
  const std::int32_t next = program_.Acquire(kTokens);
  for (const std::int32_t slot : slots) EXPECT_EQ(Common(next, slot), 0);
}

// A truncation while a handler reads: what it read through the slot may by now be another sequence's new data.
TEST_P(SharedRunsTest, WhatChangedMeanwhileIsReadAgain) {
  const std::int32_t a = program_.Fork(donor_), b = program_.Fork(donor_);
  std::vector<std::size_t> shared;
  const auto read = [&](const SharedPrefixes& prefixes) {
    shared.push_back(prefixes.order.size());
    if (shared.size() == 1) program_.Truncate(donor_, 20);
    return Status();
  };
  EXPECT_OK(pool_->shared_runs().ReadTogether(Of({a, b}), read));
  EXPECT_EQ(shared, std::vector<std::size_t>{2}) << "the donor is not among them";
  shared.clear();
  EXPECT_OK(pool_->shared_runs().ReadTogether(Of({donor_, a, b}), [&](const SharedPrefixes& prefixes) {
    shared.push_back(prefixes.order.size());
    if (shared.size() == 1) program_.Truncate(a, 5);
    return Status();
  }));
  EXPECT_EQ(shared, (std::vector<std::size_t>{3, 0}));
}

// Beams: a fork of another beam replaces the donor.
TEST_P(SharedRunsTest, AReorder) {
  const std::int32_t other = program_.Fork(donor_, 16);
  WriteStamped(pool_.get(), &program_, other, 32, 2);
  EXPECT_EQ(Common(donor_, other), 16);
  const Claim claim = pool_->Fork("reorder", {{other, -1}}, {donor_});
  EXPECT_OK(claim.status);
  EXPECT_OK(program_.RunFork(claim.slots[0], other, kTokens));
  EXPECT_EQ(Common(other, claim.slots[0]), 48);
  EXPECT_EQ(Common(donor_, claim.slots[0]), 16) << "its programs may still be running";
  EXPECT_OK(program_.Vacate(donor_));
  const std::int32_t next = program_.Acquire(kTokens);
  EXPECT_EQ(Common(next, other), 0);
}

INSTANTIATE_TEST_SUITE_P(Layouts, SharedRunsTest, ::testing::Values(Layout::kFused, Layout::kPerLayer));

}  // namespace
}  // namespace kvpage::testing
