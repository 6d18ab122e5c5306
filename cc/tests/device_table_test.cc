// The table of a device's pools on the fake driver: entries that collide, and which call raises a fault.
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/device_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {

TEST(DeviceTableTest, FaultsAreRaisedOnceByTheNextCall) {
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
      [&] { return StartRelease(*pool, {slot}); },
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
    program.Write(slot, 17);  // a second fault before the host looks: the first one counts
    EXPECT_OK(other->TakeFault());
    EXPECT_EQ(pool->Numbers().slots_occupied, 1);  // looking raises nothing
    EXPECT_EQ(pool->Rows().size(), std::size_t{1});
    const Status status = call();
    EXPECT_TRUE(Mentions(status, text)) << status.message();
    EXPECT_EQ(pool->Numbers().slots_occupied, 1);
    EXPECT_OK(pool->TakeFault());
    EXPECT_EQ(machine.Find(1)->faulted, 0u);
  }
  program.Write(slot, 16);  // the generation was never broken
  EXPECT_EQ(program.length(slot), 16);
  // A new generation gets past a fault, which stays recorded until it is asked for.
  provoke();
  program.Restart(pool.get());
  EXPECT_TRUE(Mentions(pool->TakeFault(), text));
}

TEST(DeviceTableTest, FaultsOfUnknownPoolsAreRaisedByAnyPoolOfTheDevice) {
  Machine machine(2);
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  const std::shared_ptr<Pool> elsewhere = machine.MakePool(3, 16, 1);
  std::shared_ptr<Pool> registered = machine.MakePool(900, 16);
  Register(registered);  // assigns it an id of this process
  DeviceProgram stranger(&machine, 1000);
  stranger.Use({1, 1, {0, 0, 0, 0}});
  stranger.Write(0, 1);
  EXPECT_OK(elsewhere->TakeFault());
  EXPECT_EQ(pool->TakeFault().message(),
            "append_kv: there is no pool 1000 in this process: a cache works in the process that made it");
  EXPECT_OK(pool->TakeFault());
  DeviceProgram misplaced(&machine, registered->id(), 1);
  misplaced.Use({1, 1, {0, 0, 0, 0}});
  misplaced.Write(0, 1);
  EXPECT_TRUE(Mentions(elsewhere->TakeFault(), "is not on the device that the program ran on"));
  Unregister(registered->id());
  misplaced.Write(0, 1);
  EXPECT_TRUE(
      Mentions(elsewhere->TakeFault(), "pool " + std::to_string(registered->id()) + " is closed: make a new pool"));
}

TEST(DeviceTableTest, NothingIsRelocated) {
  Machine machine(1);
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  relocation::Report report;
  const Status status = pool->Relocate({1 << 20, true, {}, false}, &report);
  EXPECT_EQ(status.code(), Code::kUnimplemented);
  EXPECT_TRUE(Mentions(status, "relocate: pool 1 lies in device memory")) << status.message();
}

TEST(DeviceTableTest, PoolsWhoseIdsCollideKeepTheirEntries) {
  Machine machine(2);
  std::vector<std::shared_ptr<Pool>> pools;
  for (std::int32_t id : {5, 5 + kMaxDevicePools, 6, 5 + 2 * kMaxDevicePools}) pools.push_back(machine.MakePool(id, 4));
  const std::shared_ptr<Pool> same_id = machine.MakePool(5, 4, 1);
  const auto works = [&](Pool* pool, int device) {
    DeviceProgram program(&machine, pool->id(), device);
    program.Restart(pool);
    const std::int32_t slot = Acquire(pool, &program, 16);
    program.Write(slot, 3);
    EXPECT_EQ(program.length(slot), 3);
    Release(pool, &program, slot);
    EXPECT_OK(pool->TakeFault());
    EXPECT_EQ(machine.Find(pool->id(), device)->view.base, pool->View().base);
  };
  for (const auto& pool : pools) works(pool.get(), 0);
  works(same_id.get(), 1);
  // One leaves from the middle: those after it are still found, and its entry is reused.
  pools[1]->Close();
  pools.erase(pools.begin() + 1);
  EXPECT_EQ(machine.Find(5 + kMaxDevicePools), nullptr);
  for (const auto& pool : pools) works(pool.get(), 0);
  pools.push_back(machine.MakePool(5 + 3 * kMaxDevicePools, 4));
  EXPECT_EQ(machine.Find(5 + 3 * kMaxDevicePools) - machine.device()->table(), 6);
  for (const auto& pool : pools) works(pool.get(), 0);
}

TEST(DeviceTableTest, ADeviceHasRoomForSoManyPools) {
  Machine machine;
  PinnedMemory image;
  EXPECT_OK(PinnedMemory::Make(machine.device()->context(), sizeof(DevicePool), "for a test", &image));
  DevicePool* entry = new (image.data()) DevicePool;
  std::int32_t place = -1;
  for (std::int32_t i = 0; i < kMaxDevicePools; ++i) {
    entry->id = 1000 + i;
    EXPECT_OK(machine.device()->AddEntry(entry, &place));
  }
  entry->id = 3;
  const Status full = machine.device()->AddEntry(entry, &place);
  EXPECT_TRUE(Mentions(full, "CUDA device 0 has 256 pools of this process, the most that are possible: close one"))
      << full.message();
  bool waited = true;
  EXPECT_OK(machine.device()->RemoveEntry(17, &waited));
  EXPECT_FALSE(waited);
  EXPECT_OK(machine.device()->AddEntry(entry, &place));
  EXPECT_EQ(place, 17);
  EXPECT_NE(machine.Find(3), nullptr);
}

// Kernels that run meanwhile must never find a block table without its strides.
TEST(DeviceTableTest, ThePointerToABlockTableArrivesLast) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  bool strides_alone = false, opened = false;
  for (int call = 1; call <= 6 && !opened; ++call) {
    machine.fake().FailAt(cu::Call::kMemcpyHtoDAsync, call, cu::Result::kUnknown, 100);
    opened = pool->OpenTable().ok();
    machine.fake().ClearFaults();
    const KVView& view = machine.Find(1)->table_view;
    EXPECT_EQ(view.table != nullptr, opened) << call;
    strides_alone |= view.table == nullptr && view.base != nullptr && view.table_width > 0;
  }
  EXPECT_TRUE(opened);
  EXPECT_TRUE(strides_alone);
}

}  // namespace kvpage::testing
