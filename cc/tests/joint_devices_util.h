// Helpers for tests of joint decisions on devices: pools with mirrors, one on each device of a machine, that act as one
// pool, and a program for each.
#ifndef KVPAGE_TESTS_JOINT_DEVICES_UTIL_H_
#define KVPAGE_TESTS_JOINT_DEVICES_UTIL_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "cache/joint_maps.h"
#include "tests/device_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {

// The result of map_slots on one device.
struct Mapped {
  Status status;
  std::vector<char> ok;
};

class JointDevices {
 public:
  static constexpr std::int32_t kFirstId = 300;

  JointDevices(int devices, std::int64_t blocks, PoolOptions options = {}) : machine(devices) {
    for (int i = 0; i < devices; ++i) {
      pools.push_back(machine.MakePool(kFirstId + i, blocks, i, options));
      programs.push_back(std::make_unique<DeviceProgram>(&machine, kFirstId + i, i));
    }
    EXPECT_OK(Pool::Join(pools, &joint));
    Restart();
  }

  int size() const { return static_cast<int>(pools.size()); }
  void Restart() {
    starts.clear();
    for (int i = 0; i < size(); ++i) {
      Pool::Generation generation;
      EXPECT_OK(pools[i]->NewGeneration(&generation));
      programs[i]->Use(generation);
      starts.push_back({generation.generation, generation.epoch});
    }
    joint->Begin(starts);
  }

  // Acquires on all devices.
  std::int32_t Acquire(std::int64_t tokens) {
    std::int32_t slot = -1;
    for (int i = 0; i < size(); ++i) {
      const std::int32_t own = testing::Acquire(pools[i].get(), programs[i].get(), tokens);
      EXPECT_TRUE(i == 0 || own == slot);
      slot = own;
    }
    return slot;
  }
  void StartReleaseOf(std::int32_t slot) {
    for (const auto& pool : pools) EXPECT_OK(StartRelease(*pool, {slot}));
  }
  void Release(std::int32_t slot) {
    StartReleaseOf(slot);
    for (const auto& program : programs) program->Release(slot);
  }

  // The call of one device, after the device's check.
  Mapped Map(int device, const std::vector<std::int32_t>& slots, const std::vector<std::int32_t>& tokens) {
    const std::unique_ptr<bool[]> ok(new bool[slots.size()]);
    Mapped mapped;
    mapped.status = pools[device]->MapChecked("map_slots", starts[device].generation, slots.data(), tokens.data(),
                                              static_cast<std::int64_t>(slots.size()), ok.get());
    if (mapped.status.ok()) mapped.ok.assign(ok.get(), ok.get() + slots.size());
    return mapped;
  }
  bool MapOne(int device, std::int32_t slot, std::int32_t tokens) {
    const Mapped mapped = Map(device, {slot}, {tokens});
    EXPECT_OK(mapped.status);
    return mapped.status.ok() && mapped.ok[0] != 0;
  }

  // Returns how many tokens of a slot programs on the device may write.
  std::int32_t Room(int device, std::int32_t slot) { return machine.Find(kFirstId + device, device)->slots[slot].room; }

  // Returns the block map of each occupied slot.
  std::map<std::int32_t, BlockReferences> Maps(int device) const {
    std::map<std::int32_t, BlockReferences> maps;
    for (const SlotRow& row : pools[device]->Rows()) {
      if (row.state != SlotState::kOccupied) continue;
      EXPECT_OK(pools[device]->BlockMap(row.slot, &maps[row.slot]));
    }
    return maps;
  }
  // Expects that no device lets programs write what is not mapped there.
  void ExpectSafe() {
    for (int i = 0; i < size(); ++i) {
      EXPECT_OK(pools[i]->Audit());
      for (const SlotRow& row : pools[i]->Rows()) {
        if (row.state != SlotState::kOccupied) continue;
        EXPECT_LE(Room(i, row.slot), row.blocks * DeviceGeometry().block_tokens) << "device " << i;
      }
    }
  }
  // Expects that all arenas map the same blocks, and that all devices let programs write what the host has promised.
  void ExpectEqual() {
    ExpectSafe();
    for (int i = 0; i < size(); ++i) {
      EXPECT_EQ(Maps(i), Maps(0)) << "device " << i;
      for (const SlotRow& row : pools[i]->Rows()) {
        if (row.state != SlotState::kOccupied) continue;
        EXPECT_EQ(Room(i, row.slot), (row.reserved + 15) / 16 * 16) << "device " << i << " slot " << row.slot;
        EXPECT_EQ(Room(i, row.slot), Room(0, row.slot)) << "device " << i;
      }
    }
  }
  void ExpectNoFaults() {
    for (const auto& pool : pools) EXPECT_OK(pool->TakeFault());
  }

  Machine machine;
  std::vector<std::shared_ptr<Pool>> pools;
  std::shared_ptr<JointMaps> joint;
  std::vector<std::unique_ptr<DeviceProgram>> programs;
  std::vector<JointMaps::Start> starts;
};

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_JOINT_DEVICES_UTIL_H_
