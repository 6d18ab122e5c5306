// Pools of one mesh keep their ops' errors, and the failed pool's ops do nothing more until a new generation.
#include "cache/shared_faults.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/pool_util.h"

namespace kvpage::testing {
namespace {

bool Contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

class SharedFaultsTest : public ::testing::Test {
 protected:
  void Make(bool in_calls) {
    const auto faults = std::make_shared<SharedFaults>(in_calls);
    for (int i = 0; i < 3; ++i) {
      pools.push_back(MakePool(SmallGeometry(), 32));
      pools.back()->set_id(70 + i);
      pools.back()->ShareFaults(faults, " (here " + std::to_string(i) + ")");
      programs.push_back(std::make_unique<Program>(pools.back().get()));
      EXPECT_EQ(programs.back()->Acquire(32), 0);
      EXPECT_OK(programs.back()->Write(0, 3));
    }
  }
  // A program of a pool writes into a free or occupied slot, and the error is kept as a handler would.
  Status Write(int pool, std::int32_t slot) {
    const CacheRef cache = programs[pool]->cache();
    const Status status = programs[pool]->Write(slot, 1);
    if (!status.ok()) {
      EXPECT_TRUE(pools[pool]->KeepFault(cache.generation, status));
    }
    return status;
  }

  std::vector<std::shared_ptr<Pool>> pools;
  std::vector<std::unique_ptr<Program>> programs;
};

TEST_F(SharedFaultsTest, AFaultIsEveryCallsUntilANewGeneration) {
  Make(/*in_calls=*/true);
  for (const auto& pool : pools) EXPECT_OK(pool->TakeFault());
  const Status failed = Write(1, 2);
  EXPECT_TRUE(Contains(failed.message(), "slot 2 is free")) << failed.message();
  for (const auto& pool : pools) {
    for (int i = 0; i < 2; ++i) {
      for (const Status& status : {pool->TakeFault(), pool->Commit(0, {1}), pool->Acquire({1}).status}) {
        EXPECT_EQ(status.reason(), Reason::kDeviceFault);
        EXPECT_EQ(status.code(), failed.code());
        EXPECT_TRUE(Contains(status.message(), "slot 2 is free")) << status.message();
        EXPECT_TRUE(Contains(status.message(), "(here 1)")) << status.message();
      }
    }
  }
  // The failed pool's programs do nothing more, not even valid ops; those of other pools continue.
  EXPECT_OK(pools[0]->UntoldFault());
  EXPECT_EQ(Write(1, 0).message(), failed.message());
  EXPECT_OK(Write(0, 0));
  Pool::Generation generation;
  EXPECT_OK(pools[0]->NewGeneration(&generation));
  EXPECT_EQ(pools[0]->TakeFault().reason(), Reason::kDeviceFault);  // the failed pool's generation is the same
  programs[1]->Restart();
  EXPECT_EQ(programs[1]->length(0), 3);
  for (const auto& pool : pools) {
    EXPECT_OK(pool->TakeFault());
    EXPECT_OK(pool->Commit(0, {1}));
  }
  EXPECT_OK(Write(1, 0));
}

TEST_F(SharedFaultsTest, WhatNobodyHasHeardOutlivesItsGeneration) {
  Make(/*in_calls=*/true);
  EXPECT_FALSE(Write(2, 1).ok());
  EXPECT_FALSE(pools[0]->UntoldFault().ok());
  programs[2]->Restart();
  EXPECT_FALSE(pools[0]->UntoldFault().ok());
  EXPECT_OK(pools[2]->Commit(0, {1}));  // the fault is of an older generation: only calls that look for it report it
  EXPECT_OK(Write(2, 0));
  EXPECT_TRUE(Contains(pools[0]->TakeFault().message(), "slot 1 is free"));
  EXPECT_OK(pools[0]->TakeFault());
  // A program of an older generation does not affect the newer one.
  const CacheRef old = programs[0]->cache();
  Pool::Generation generation;
  EXPECT_OK(pools[0]->NewGeneration(&generation));
  PinnedSlots pinned;
  const std::int32_t slots[] = {0}, offsets[] = {0, 1};
  const Status status = pools[0]->Begin("append_kv", old, {slots, 1, offsets}, 0, true, &pinned);
  EXPECT_TRUE(Contains(status.message(), "generation")) << status.message();
  EXPECT_TRUE(pools[0]->KeepFault(old.generation, status));
  EXPECT_OK(pools[0]->Commit(0, {1}));
  EXPECT_TRUE(Contains(pools[1]->TakeFault().message(), "generation"));
  EXPECT_OK(pools[1]->TakeFault());
}

TEST_F(SharedFaultsTest, CallsOfSeveralProcessesFailOnlyWhereAllLook) {
  Make(/*in_calls=*/false);
  EXPECT_FALSE(Write(0, 3).ok());
  EXPECT_OK(pools[0]->Commit(0, {1}));
  EXPECT_OK(pools[1]->Acquire({1}).status);
  EXPECT_TRUE(Contains(pools[1]->TakeFault().message(), "slot 3 is free"));
}

TEST_F(SharedFaultsTest, AClosedPoolKeepsNothing) {
  Make(/*in_calls=*/true);
  const CacheRef cache = programs[0]->cache();
  pools[0]->Close();
  const Status status = programs[0]->Write(0, 1);
  EXPECT_EQ(status.reason(), Reason::kClosed);
  EXPECT_FALSE(pools[0]->KeepFault(cache.generation, status));
  const std::shared_ptr<Pool> alone = MakePool(SmallGeometry(), 32);
  EXPECT_FALSE(alone->KeepFault(0, status));
}

}  // namespace
}  // namespace kvpage::testing
