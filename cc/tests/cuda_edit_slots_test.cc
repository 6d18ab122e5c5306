// Copies by edit_slots: on the CPU and the emulated device, every byte of the target's tokens becomes the source's, and
// nothing else changes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "tests/cuda_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

constexpr std::int32_t kSlots = 3, kBlockTokens = 16, kMaxTokens = 60;

Geometry CopyGeometry(std::int64_t head_dim, DType dtype, Layout layout) {
  Geometry geometry;
  const SpecInts spec = {
      2,           2, head_dim, kSlots, kMaxTokens, static_cast<std::int64_t>(dtype), static_cast<std::int64_t>(layout),
      kBlockTokens};
  const std::int64_t row =
      head_dim * static_cast<std::int64_t>(ItemSize(dtype)) + static_cast<std::int64_t>(ScaleSize(dtype));
  const std::int64_t block = kBlockTokens * 2 * row * (layout == Layout::kFused ? 4 : 1);
  EXPECT_OK(Geometry::Make(spec, block, &geometry));
  return geometry;
}

// The definition of a copy: element by element, through the view.
void CopyPlainly(const KVView& view, const TokenCopy& copy, std::vector<char>* memory) {
  KVView to = view;
  to.base = memory->data();
  const auto row = static_cast<std::size_t>(view.head_dim) * ItemSize(view.dtype);
  for (std::int64_t token = copy.first; token < copy.end(); ++token) {
    for (int layer = 0; layer < 2; ++layer) {
      for (int kv = 0; kv < 2; ++kv) {
        for (int head = 0; head < view.num_kv_heads; ++head) {
          std::memcpy(to.At(copy.target, token, layer, kv, head), view.At(copy.source, token, layer, kv, head), row);
          if (!IsQuantized(view.dtype)) continue;
          std::memcpy(to.Scale(copy.target, token, layer, kv, head), view.Scale(copy.source, token, layer, kv, head),
                      sizeof(float));
        }
      }
    }
  }
}

struct Threads final : Parallel {
  int num_workers() const override { return 3; }
  void For(std::int64_t tasks, const std::function<void(std::int64_t, int)>& fn) override {
    for (std::int64_t task = tasks - 1; task >= 0; --task) fn(task, static_cast<int>(task % 3));
  }
};

void CheckCopies(const Geometry& geometry, const std::vector<TokenCopy>& copies, const std::string& what) {
  std::vector<char> start(static_cast<std::size_t>(geometry.virtual_bytes()));
  for (std::size_t i = 0; i < start.size(); ++i) start[i] = static_cast<char>(i * 2654435761u >> 13);
  std::vector<char> cpu = start, device = start, wanted = start;
  for (const TokenCopy& copy : copies) {
    if (copy.source >= 0) CopyPlainly(geometry.View(start.data()), copy, &wanted);
  }
  Threads threads;
  cpu::CopyTokens(geometry.View(cpu.data()), 2, copies.data(), static_cast<std::int64_t>(copies.size()), threads);
  EXPECT_TRUE(cpu == wanted) << what;

  DeviceTable table;
  PoolRows rows = table.Add(geometry.spec(), geometry.View(device.data()), 5);
  for (int slot = 0; slot < kSlots; ++slot) {
    rows.slot(slot).room = kMaxTokens;
    for (int layer = 0; layer < 2; ++layer) rows.written(slot, layer) = slot == 0 ? 50 : 20;
  }
  const auto run = [&](std::int32_t generation) {
    const CacheBuffers buffers(5, generation, rows.entry().epoch, {50, 20, 20});
    const auto own = Ints({5, 0});
    const auto list = Exactly(copies);
    const auto scratch = Scratch(0, 0);
    EXPECT_OK(cuda::EditSlots(buffers.Operands(DeviceOp::kAcquire, table, geometry.spec()), own.get(),
                              {nullptr, 0, list.get(), static_cast<std::int64_t>(copies.size())}, buffers.epoch.get(),
                              buffers.lengths.get(), scratch.get(), nullptr));
    return rows.TakeFault().kind;
  };
  EXPECT_EQ(run(1), static_cast<std::int32_t>(FaultKind::kGeneration));
  EXPECT_TRUE(device == start) << what << "a failed check copied";
  EXPECT_EQ(run(0), 0);
  EXPECT_TRUE(device == wanted) << what;
  for (const TokenCopy& copy : copies) {
    if (copy.source < 0) continue;
    EXPECT_EQ(rows.written(copy.target, 1), std::max(copy.target == 0 ? 50 : 20, copy.first + copy.count));
    EXPECT_EQ(rows.slot(copy.target).since, rows.entry().epoch);
  }
}

TEST(CudaEditSlotsTest, CopiesAreBitIdentical) {
  const std::vector<std::vector<TokenCopy>> lists = {
      {{0, 1, 0, 50}, {0, 2, 0, 33}},                     // one source, several targets, across blocks
      {{-1, -1, -1, -1}, {0, 2, 19, 1}, {0, 1, 16, 16}},  // ragged
      {{0, 1, 15, 2}, {0, 2, 20, 0}},                     // a block's end; nothing
      {{1, 0, 3, 14}},                                    // into tokens that are already written
  };
  for (const Layout layout : {Layout::kFused, Layout::kPerLayer}) {
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
      for (const std::int64_t head_dim : {16, 4, 3}) {
        const Geometry geometry = CopyGeometry(head_dim, dtype, layout);
        for (std::size_t i = 0; i < lists.size(); ++i) {
          CheckCopies(geometry, lists[i],
                      std::string(Name(dtype)) + " " + std::to_string(head_dim) + " list " + std::to_string(i));
        }
      }
    }
  }
}

// A device's slot table in which slot 0 has 50 tokens, slot 1 has 20 and slot 2 is free.
struct Forks {
  explicit Forks(const Geometry& of)
      : geometry(of), memory(static_cast<std::size_t>(of.virtual_bytes())), rows(Add()), lengths({50, 20, -1}) {
    for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<char>(i * 2654435761u >> 13);
    for (int slot = 0; slot < kSlots; ++slot) {
      rows.slot(slot).room = kMaxTokens;
      rows.slot(slot).released = slot == 2 ? 1 : 0;
      for (int layer = 0; layer < 2; ++layer) rows.written(slot, layer) = std::max(lengths[slot], 0);
    }
  }
  PoolRows Add() { return table.Add(geometry.spec(), geometry.View(memory.data()), 5); }
  FaultKind Run(const std::vector<SlotEdit>& edits, const std::vector<TokenCopy>& copies) {
    const CacheBuffers buffers(5, 0, rows.entry().epoch, lengths);
    const auto own = Ints({5, 0});
    const auto edit_list = Exactly(edits);
    const auto copy_list = Exactly(copies);
    const auto scratch = Scratch(0, 0);
    EXPECT_OK(cuda::EditSlots(buffers.Operands(DeviceOp::kFork, table, geometry.spec()), own.get(),
                              {edit_list.get(), static_cast<std::int64_t>(edits.size()), copy_list.get(),
                               static_cast<std::int64_t>(copies.size())},
                              buffers.epoch.get(), buffers.lengths.get(), copies.empty() ? nullptr : scratch.get(),
                              nullptr));
    after.assign(buffers.lengths.get(), buffers.lengths.get() + kSlots);
    return static_cast<FaultKind>(rows.TakeFault().kind);
  }

  const Geometry geometry;
  std::vector<char> memory;
  DeviceTable table;
  PoolRows rows;
  std::vector<std::int32_t> lengths, after;
};

SlotEdit ForkOf(std::int32_t donor, std::int32_t length, std::int32_t slot = 2) {
  return {static_cast<std::int32_t>(SlotOpcode::kFork), slot, length, donor};
}

TEST(CudaEditSlotsTest, AForkCopiesTheLastBlocksTokens) {
  for (const Layout layout : {Layout::kFused, Layout::kPerLayer}) {
    for (const DType dtype : {DType::kF32, DType::kI8}) {
      Forks f(CopyGeometry(16, dtype, layout));
      const TokenCopy copy = {0, 2, 32, 7};
      std::vector<char> wanted = f.memory;
      CopyPlainly(f.geometry.View(f.memory.data()), copy, &wanted);
      EXPECT_EQ(f.Run({ForkOf(0, 39)}, {copy}), FaultKind{});
      EXPECT_TRUE(f.memory == wanted);
      EXPECT_EQ(f.after, (std::vector<std::int32_t>{50, 20, 39}));
      EXPECT_EQ(f.rows.slot(2).length, 39);
      EXPECT_EQ(f.rows.slot(2).released, 0);
      EXPECT_EQ(f.rows.slot(2).since, f.rows.entry().epoch);
      for (int layer = 0; layer < 2; ++layer) EXPECT_EQ(f.rows.written(2, layer), 39);
    }
  }
}

TEST(CudaEditSlotsTest, WholeBlocksCountAsWritten) {
  Forks f(CopyGeometry(16, DType::kF32, Layout::kFused));
  const std::vector<char> before = f.memory;
  EXPECT_EQ(f.Run({ForkOf(0, 48)}, {}), FaultKind{});
  EXPECT_EQ(f.rows.written(2, 1), 48);
  f.lengths = f.after;
  EXPECT_EQ(f.Run({{static_cast<std::int32_t>(SlotOpcode::kTruncate), 2, 5}}, {}), FaultKind{});
  EXPECT_EQ(f.after, (std::vector<std::int32_t>{50, 20, 5}));
  EXPECT_EQ(f.rows.written(2, 1), 5);
  EXPECT_TRUE(f.memory == before);
}

TEST(CudaEditSlotsTest, DonorsAreChecked) {
  Forks f(CopyGeometry(16, DType::kF32, Layout::kFused));
  const std::vector<char> before = f.rows.State();
  const std::int32_t set_length = static_cast<std::int32_t>(SlotOpcode::kSetLength);
  EXPECT_EQ(f.Run({ForkOf(0, 39), {set_length, 0, 40}}, {}), FaultKind::kDonorEdited);
  EXPECT_EQ(f.Run({{set_length, 0, 40}, ForkOf(0, 39)}, {}), FaultKind::kDonorEdited);
  EXPECT_EQ(f.Run({ForkOf(2, 0)}, {}), FaultKind::kDonorEdited) << "itself";
  EXPECT_EQ(f.Run({ForkOf(0, 39), {set_length, 1, 21}}, {}), FaultKind::kRaise) << "slots first, then donors";
  EXPECT_EQ(f.Run({ForkOf(1, 21)}, {}), FaultKind::kUnwritten);
  f.rows.written(1, 1) = 19;
  EXPECT_EQ(f.Run({ForkOf(1, 20)}, {}), FaultKind::kUnwritten) << "in one layer";
  f.rows.written(1, 1) = 20;
  EXPECT_EQ(f.Run({ForkOf(0, kMaxTokens + 1)}, {}), FaultKind::kUnmapped);
  EXPECT_EQ(f.Run({ForkOf(0, -1)}, {}), FaultKind::kUnmapped);
  for (const std::int32_t donor : {-1, kSlots}) EXPECT_EQ(f.Run({ForkOf(donor, 0)}, {}), FaultKind::kSlotRange);
  EXPECT_EQ(f.Run({ForkOf(0, 9, 1)}, {}), FaultKind::kSlotTaken);
  f.lengths[0] = -1;
  EXPECT_EQ(f.Run({ForkOf(0, 0)}, {}), FaultKind::kSlotFree);
  f.lengths[0] = 50;
  f.rows.slot(0).since = f.rows.entry().epoch + 1;
  EXPECT_EQ(f.Run({ForkOf(0, 9)}, {}), FaultKind::kSlotEpoch);
  f.rows.slot(0).since = 0;
  EXPECT_TRUE(f.rows.State() == before);
}

}  // namespace
}  // namespace kvpage::testing
