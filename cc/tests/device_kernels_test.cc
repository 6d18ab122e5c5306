// The kernels (on the emulated device) against the table that the host maintains (on the fake driver): each side reads
// what the other writes.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "device/fault.h"
#include "kernels/cuda/kernels.h"
#include "tests/device_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

// A program's cache value, and its ops with the CUDA kernels.
struct Kernels {
  Machine* machine;
  std::int32_t handle[2] = {0, 0};
  std::uint32_t epoch = 0;
  std::vector<std::int32_t> lengths;

  Kernels(Machine* m, Pool* pool) : machine(m) {
    handle[0] = pool->id();
    Restart(pool);
  }
  void Restart(Pool* pool) {
    Pool::Generation generation;
    EXPECT_OK(pool->NewGeneration(&generation));
    handle[1] = generation.generation;
    epoch = generation.epoch;
    lengths = generation.lengths;
  }
  cuda::CacheOperands Cache(DeviceOp op, Pool* pool) {
    cuda::CacheOperands cache;
    cache.op = op;
    cache.pools = machine->device()->table();
    cache.handle = handle;
    cache.epoch = &epoch;
    cache.lengths = lengths.data();
    cache.spec = pool->geometry().spec();
    return cache;
  }
  void ChangeOwner(Pool* pool, std::int32_t slot, bool occupy) {
    const SlotEdit edit = {static_cast<std::int32_t>(occupy ? SlotOpcode::kOccupy : SlotOpcode::kVacate), slot, 0};
    EXPECT_OK(cuda::EditSlots(Cache(occupy ? DeviceOp::kAcquire : DeviceOp::kRelease, pool), handle,
                              {&edit, 1, nullptr, 0}, &epoch, lengths.data(), nullptr, nullptr));
  }
  // Appends `count` tokens in every layer and advances.
  void Write(Pool* pool, std::int32_t slot, std::int32_t count) {
    const std::int32_t offsets[] = {0, count};
    const std::vector<float> rows(static_cast<std::size_t>(count) * 16, 2.5f);
    cuda::BatchOperands batch = {&slot, offsets, 1, count};
    std::vector<char> scratch(cuda::CheckedBytes(1, 0) + 256);
    void* const checked = scratch.data() + (256 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 256);
    for (std::int32_t layer = 0; layer < kLayers; ++layer) {
      const cuda::AppendOperands append = {&layer, rows.data(), rows.data(), DType::kF32, 1, 16};
      EXPECT_OK(cuda::AppendKV(Cache(DeviceOp::kAppendKV, pool), batch, append, &epoch, checked, nullptr));
    }
    batch.num_tokens = -1;
    EXPECT_OK(cuda::Advance(Cache(DeviceOp::kAdvance, pool), batch, &epoch, lengths.data(), nullptr));
  }
  bool Map(Pool* pool, std::int32_t slot, std::int32_t tokens) {
    std::int32_t verdict = -1;
    EXPECT_OK(cuda::CheckMapSlots(Cache(DeviceOp::kMapSlots, pool), &slot, &tokens, 1, &epoch, &verdict, nullptr));
    if (verdict != 1) return false;
    bool ok = false;
    EXPECT_OK(pool->MapChecked("map_slots", handle[1], &slot, &tokens, 1, &ok));
    return ok;
  }
};

}  // namespace

TEST(DeviceKernelsTest, KernelsAndHostAgreeOnTheTable) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(300, 16);
  Kernels program(&machine, pool.get());
  const std::int32_t slot = pool->Acquire({16}).slots[0];
  program.ChangeOwner(pool.get(), slot, true);
  EXPECT_EQ(program.lengths[slot], 0);
  program.Write(pool.get(), slot, 16);
  EXPECT_EQ(program.lengths[slot], 16);
  EXPECT_EQ(*reinterpret_cast<const float*>(pool->View().At(slot, 15, 1, 1, 0)), 2.5f);
  EXPECT_OK(pool->TakeFault());

  // Beyond its room there is a fault with a clear message; map_slots makes room.
  program.Write(pool.get(), slot, 10);
  EXPECT_EQ(pool->TakeFault().message(),
            "append_kv: slot " + std::to_string(slot) +
                ": 26 tokens wanted, 16 mapped: map_slots in the program or pool.extend before it makes room");
  EXPECT_EQ(program.lengths[slot], 16);
  EXPECT_TRUE(program.Map(pool.get(), slot, 26));
  program.Write(pool.get(), slot, 10);
  EXPECT_OK(pool->TakeFault());
  EXPECT_EQ(program.lengths[slot], 26);

  // A new generation restores the length; the old cache is stale.
  Kernels old = program;
  program.Restart(pool.get());
  EXPECT_EQ(program.lengths[slot], 26);
  EXPECT_EQ(machine.Find(300)->written[slot * kLayers], 26);
  old.Write(pool.get(), slot, 1);
  EXPECT_TRUE(Mentions(pool->TakeFault(),
                       "append_kv: stale cache: it belongs to generation 1 of pool 300, which is at generation 2"));

  // The host notices the release without a driver call, and nothing is left for the slot's next owner.
  EXPECT_OK(StartRelease(*pool, {slot}));
  const std::int64_t calls = machine.fake().total_calls();
  EXPECT_EQ(pool->Numbers().slots_draining, 1);
  program.ChangeOwner(pool.get(), slot, false);
  EXPECT_EQ(pool->Numbers().slots_draining, 0);
  EXPECT_EQ(machine.fake().total_calls(), calls);
  EXPECT_EQ(machine.Find(300)->slots[slot].length, 0);
  EXPECT_EQ(machine.Find(300)->written[slot * kLayers], 0);

  pool->Close();
  program.ChangeOwner(pool.get(), slot, true);
  EXPECT_EQ(machine.Find(300)->fault->kind, static_cast<std::int32_t>(FaultKind::kClosed));
}

TEST(DeviceKernelsTest, KernelsFindPoolsWhoseIdsCollide) {
  Machine machine;
  std::vector<std::shared_ptr<Pool>> pools;
  for (std::int32_t id : {9, 9 + kMaxDevicePools, 10}) pools.push_back(machine.MakePool(id, 4));
  pools.erase(pools.begin());
  for (const auto& pool : pools) {
    Kernels program(&machine, pool.get());
    const std::int32_t slot = pool->Acquire({16}).slots[0];
    program.ChangeOwner(pool.get(), slot, true);
    program.Write(pool.get(), slot, 4);
    EXPECT_EQ(program.lengths[slot], 4);
    EXPECT_OK(pool->TakeFault());
  }
  Kernels stranger(&machine, pools[0].get());
  stranger.handle[0] = 9;
  stranger.ChangeOwner(pools[0].get(), 0, true);
  EXPECT_TRUE(Mentions(pools[1]->TakeFault(), "acquire: there is no pool 9 in this process"));
}

}  // namespace kvpage::testing
