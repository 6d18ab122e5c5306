// Helpers for tests of joint decisions: several pools that act as one, and a program for each.
#ifndef KVPAGE_TESTS_JOINT_UTIL_H_
#define KVPAGE_TESTS_JOINT_UTIL_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "cache/joint_maps.h"
#include "tests/expect_ok.h"
#include "tests/faulty_vmm.h"
#include "tests/pool_util.h"

namespace kvpage::testing {

// The result of map_slots on one device.
struct Mapped {
  Status status;
  std::vector<char> ok;
};

class JointPools {
 public:
  JointPools(int devices, std::int64_t blocks, const Geometry& geometry = SmallGeometry(), PoolOptions options = {}) {
    for (int i = 0; i < devices; ++i) {
      auto vmm = std::make_unique<FaultyVmm>(MakeVmm(geometry, i));
      vmms.push_back(vmm.get());
      pools.push_back(MakePool(geometry, blocks, options, std::move(vmm)));
    }
    EXPECT_OK(Pool::Join(pools, &joint));
    for (const auto& pool : pools) programs.push_back(std::make_unique<Program>(pool.get()));
    Begin();
  }

  // Gives the programs the joint generation.
  void Begin() {
    std::vector<JointMaps::Start> starts;
    for (const auto& program : programs) starts.push_back({program->cache().generation, program->cache().epoch});
    joint->Begin(std::move(starts));
  }
  void Restart() {
    for (const auto& program : programs) program->Restart();
    Begin();
  }
  int size() const { return static_cast<int>(pools.size()); }

  // Acquires on all devices.
  std::int32_t Acquire(std::int64_t tokens) {
    std::int32_t slot = -1;
    for (const auto& program : programs) {
      const std::int32_t own = program->Acquire(tokens);
      if (program != programs[0]) {
        EXPECT_EQ(own, slot);
      }
      slot = own;
    }
    return slot;
  }
  void Release(std::int32_t slot) {
    for (const auto& program : programs) program->Release(slot);
  }
  void StartReleaseOf(std::int32_t slot) {
    for (const auto& pool : pools) EXPECT_OK(StartRelease(*pool, {slot}));
  }

  // The call of one device.
  Mapped Map(int device, const std::vector<std::int32_t>& slots, const std::vector<std::int32_t>& tokens) {
    Program& program = *programs[device];
    const std::unique_ptr<bool[]> ok(new bool[slots.size()]);
    std::uint32_t epoch = program.cache().epoch;
    Mapped mapped;
    mapped.status = pools[device]->MapSlots("map_slots", program.cache(), slots.data(), tokens.data(),
                                            static_cast<std::int64_t>(slots.size()), ok.get(), &epoch);
    if (mapped.status.ok()) {
      program.SetEpoch(epoch);
      mapped.ok.assign(ok.get(), ok.get() + slots.size());
    }
    return mapped;
  }
  bool MapOne(int device, std::int32_t slot, std::int32_t tokens) {
    const Mapped mapped = Map(device, {slot}, {tokens});
    EXPECT_OK(mapped.status);
    return mapped.status.ok() && mapped.ok[0] != 0;
  }

  // Returns the block map of each occupied slot.
  std::map<std::int32_t, BlockReferences> Maps(int device) const {
    std::map<std::int32_t, BlockReferences> maps;
    for (const SlotRow& row : pools[device]->Rows()) {
      if (row.state != SlotState::kOccupied) continue;
      EXPECT_OK(pools[device]->BlockMap(row.slot, &maps[row.slot]));
    }
    return maps;
  }
  // Expects that all arenas map the same blocks, and that all accounts are right.
  void ExpectEqual() const {
    for (int i = 0; i < size(); ++i) {
      EXPECT_OK(pools[i]->Audit());
      EXPECT_EQ(Maps(i), Maps(0)) << "device " << i;
    }
  }

  std::vector<FaultyVmm*> vmms;
  std::vector<std::shared_ptr<Pool>> pools;
  std::shared_ptr<JointMaps> joint;
  std::vector<std::unique_ptr<Program>> programs;
};

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_JOINT_UTIL_H_
