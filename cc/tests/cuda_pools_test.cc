// Checks that exist only on devices: finding the pool in the table, keeping the first fault, old epochs.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "tests/cuda_util.h"
#include "tests/expect_ok.h"
#include "tests/pool_util.h"

namespace kvpage::testing {
namespace {

struct Head {
  Geometry geometry = SmallGeometry();
  DeviceTable table;
  PoolRows rows = table.Add(geometry.spec(), geometry.View(nullptr), 5);
  std::vector<std::int32_t> lengths = std::vector<std::int32_t>(kSlots, -1);

  // Acquires slot 0 by a program of pool `id`; returns the fault recorded for the pool or without one.
  Fault Acquire(std::int32_t id, const SpecInts& spec, std::int32_t own) {
    const CacheBuffers buffers(id, 0, rows.entry().epoch, lengths);
    const auto handle = Ints({own, 0});
    const auto edits = Exactly<SlotEdit>({{static_cast<std::int32_t>(SlotOpcode::kOccupy), 0, 0}});
    EXPECT_OK(cuda::EditSlots(buffers.Operands(DeviceOp::kAcquire, table, spec), handle.get(),
                              {edits.get(), 1, nullptr, 0}, buffers.epoch.get(), buffers.lengths.get(), nullptr,
                              nullptr));
    const Fault fault = rows.TakeFault();
    if (fault.set != 0) return fault;
    return PoolRows::Take(&table.entries[kMaxDevicePools], table.no_pool.get());
  }
  FaultKind Kind(std::int32_t id, std::int32_t own) {
    return static_cast<FaultKind>(Acquire(id, geometry.spec(), own).kind);
  }
};

TEST(CudaPoolsTest, PoolsAreFoundByLookingOn) {
  Head head;
  EXPECT_EQ(head.Kind(5, 5), FaultKind::kNone);
  for (const std::int32_t id : {6, 4, 0, -1, -5, 5 + kMaxDevicePools, 1 << 30}) {
    const Fault fault = head.Acquire(id, head.geometry.spec(), id);
    EXPECT_EQ(static_cast<FaultKind>(fault.kind), FaultKind::kNoPool) << id;
    EXPECT_EQ(fault.have, id);
  }
  // The entry where the search starts belongs to another pool, or did; the search wraps around the end of the table.
  head.rows.entry().id = kLeftEntry;
  PoolRows late(head.geometry.spec(), head.geometry.View(nullptr), 2 * kMaxDevicePools - 1, &head.table.entries[0]);
  late.entry().epoch = head.rows.entry().epoch;
  head.table.entries[kMaxDevicePools - 1].id = kMaxDevicePools - 1;
  EXPECT_EQ(head.Kind(2 * kMaxDevicePools - 1, 2 * kMaxDevicePools - 1), FaultKind::kNone);
  EXPECT_EQ(late.entry().epoch, head.rows.entry().epoch + 1);
  // The search for the largest id starts at the last entry.
  late.entry().id = std::numeric_limits<std::int32_t>::max();
  late.entry().epoch = head.rows.entry().epoch;
  EXPECT_EQ(head.Kind(late.entry().id, late.entry().id), FaultKind::kNone);
  for (int i = 0; i < kMaxDevicePools; ++i)
    head.table.entries[i].id = kLeftEntry;  // no entry is empty, but the search still ends
  EXPECT_EQ(head.Kind(5, 5), FaultKind::kNoPool);
}

TEST(CudaPoolsTest, WrongPoolsAndPrograms) {
  Head head;
  for (int i = 0; i < 8; ++i) {
    SpecInts spec = head.geometry.spec();
    if (i != 3) spec[i] += 1;  // more slots than the cache value has, whose lengths would be too short
    if (i == 3) spec[i] -= 1;
    const Fault fault = head.Acquire(5, spec, 5);
    EXPECT_EQ(static_cast<FaultKind>(fault.kind), FaultKind::kSpec);
    EXPECT_EQ(fault.index, i);
    EXPECT_EQ(fault.wanted, spec[i]);
    EXPECT_EQ(fault.have, head.geometry.spec()[i]);
  }
  const Fault foreign = head.Acquire(5, head.geometry.spec(), 9);
  EXPECT_EQ(static_cast<FaultKind>(foreign.kind), FaultKind::kForeignCache);
  EXPECT_EQ(foreign.wanted, 5);
  EXPECT_EQ(foreign.have, 9);
  head.rows.entry().open = 0;
  EXPECT_EQ(head.Kind(5, 5), FaultKind::kClosed);
}

TEST(CudaPoolsTest, TheFirstFaultStays) {
  Head head;
  const CacheBuffers stale(5, 0, 3, head.lengths), generation(5, 1, 0, head.lengths);
  const auto slots = Ints({0}), values = Ints({0});
  const auto epoch = Exactly<std::uint32_t>(1);
  const auto lengths = Exactly<std::int32_t>(kSlots);
  for (const CacheBuffers* buffers : {&stale, &generation}) {
    EXPECT_OK(cuda::SetLengths(buffers->Operands(DeviceOp::kSetLengths, head.table, head.geometry.spec()), slots.get(),
                               values.get(), 1, epoch.get(), lengths.get(), nullptr));
  }
  EXPECT_EQ(head.rows.entry().faulted, 1u);
  const Fault fault = head.rows.TakeFault();
  EXPECT_EQ(static_cast<FaultKind>(fault.kind), FaultKind::kEpoch);
  EXPECT_EQ(fault.wanted, 3);
  EXPECT_EQ(fault.set, 1u);
}

TEST(CudaPoolsTest, OldMarksAreDraggedAlong) {
  Head head;
  head.rows.entry().epoch = 0x3fffffffu;
  for (int slot = 0; slot < kSlots; ++slot) head.rows.slot(slot).since = slot == 1 ? 0xffffff00u : 0x100u + slot;
  head.lengths = {0, -1, -1, -1};
  const CacheBuffers buffers(5, 0, 0x3fffffffu, head.lengths);
  const auto edits = Exactly<SlotEdit>({{static_cast<std::int32_t>(SlotOpcode::kOccupy), 2, 0}});
  EXPECT_OK(cuda::EditSlots(buffers.Operands(DeviceOp::kAcquire, head.table, head.geometry.spec()),
                            buffers.handle.get(), {edits.get(), 1, nullptr, 0}, buffers.epoch.get(),
                            buffers.lengths.get(), nullptr, nullptr));
  EXPECT_EQ(head.rows.TakeFault().kind, 0);
  EXPECT_EQ(buffers.epoch[0], 0x40000000u);
  EXPECT_EQ(head.rows.slot(0).since, 0x100u);
  EXPECT_EQ(head.rows.slot(1).since, 0u);  // from before the wraparound
  EXPECT_EQ(head.rows.slot(2).since, 0x40000000u);
}

}  // namespace
}  // namespace kvpage::testing
