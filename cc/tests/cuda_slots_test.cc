// The checks and slot table ops on the emulated device next to the pool on the CPU: the same random programs, valid and
// invalid, must get the same answers with the same messages and leave the same state.
#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "tests/cuda_random_ops.h"
#include "tests/cuda_twins.h"
#include "tests/expect_ok.h"
#include "tests/rounds.h"

namespace kvpage::testing {
namespace {

TEST(CudaSlotsTest, RandomProgramsGetTheSameAnswers) {
  std::set<std::string> kinds;
  for (int round = 0; round < Rounds(24); ++round) {
    emulation::device().seed = static_cast<std::uint64_t>(round) % 4;
    const Layout layout = round % 2 == 0 ? Layout::kFused : Layout::kPerLayer;
    Twins twins(SmallGeometry(layout), layout == Layout::kFused ? 20 : 60, round % 3 == 0,
                static_cast<std::uint64_t>(round), /*debug=*/round % 3 == 1);
    for (int i = 0; i < 600 && !::testing::Test::HasFailure(); ++i) {
      RandomOp(twins);
      EXPECT_OK(twins.pool().Audit()) << "op " << i;
      if (i % 4 == 0) twins.CompareState();
    }
    EXPECT_FALSE(::testing::Test::HasFailure()) << "round " << round;
    EXPECT_GT(twins.num_passed(), 150) << twins.num_passed();
    kinds.insert(twins.kinds().begin(), twins.kinds().end());
  }
  emulation::device().seed = 0;
  // Every fault that the pool's own state can cause has occurred.
  const auto met = [&](DeviceOp op, FaultKind kind) {
    EXPECT_EQ(kinds.count(std::string(OpName(op)) + " " + std::to_string(static_cast<int>(kind))), 1)
        << OpName(op) << " " << static_cast<int>(kind);
  };
  for (const DeviceOp op : {DeviceOp::kAppendKV, DeviceOp::kPagedAttention, DeviceOp::kAdvance, DeviceOp::kSetLengths,
                            DeviceOp::kMapSlots, DeviceOp::kAcquire, DeviceOp::kRelease}) {
    for (const FaultKind kind :
         {FaultKind::kGeneration, FaultKind::kEpoch, FaultKind::kSlotRange, FaultKind::kSlotTwice}) {
      met(op, kind);
    }
    if (op != DeviceOp::kAcquire) met(op, FaultKind::kSlotFree);
  }
  for (const DeviceOp op : {DeviceOp::kAppendKV, DeviceOp::kPagedAttention, DeviceOp::kAdvance}) {
    met(op, FaultKind::kOffsetsStart);
    met(op, FaultKind::kOffsetsOrder);
  }
  met(DeviceOp::kPagedAttention, FaultKind::kSlotEpoch);
  for (const DeviceOp op : {DeviceOp::kAppendKV, DeviceOp::kPagedAttention}) {
    met(op, FaultKind::kOffsetsEnd);
    met(op, FaultKind::kLayer);
    met(op, FaultKind::kMaxSeqLen);
    met(op, FaultKind::kUnmapped);
  }
  met(DeviceOp::kAppendKV, FaultKind::kLength);
  met(DeviceOp::kAppendKV, FaultKind::kWrittenTwice);
  met(DeviceOp::kSetLengths, FaultKind::kUnwritten);
  met(DeviceOp::kPagedAttention, FaultKind::kUnwritten);
  met(DeviceOp::kAdvance, FaultKind::kUnwritten);
  met(DeviceOp::kSetLengths, FaultKind::kRaise);
  met(DeviceOp::kSetLengths, FaultKind::kBelowShared);
  met(DeviceOp::kAppendKV, FaultKind::kShared);
  for (const FaultKind kind : {FaultKind::kDonorEdited, FaultKind::kSlotRange, FaultKind::kSlotTwice,
                               FaultKind::kUnwritten, FaultKind::kUnmapped}) {
    met(DeviceOp::kFork, kind);
  }
  met(DeviceOp::kAcquirePrefix, FaultKind::kSlotTaken);
  met(DeviceOp::kAcquirePrefix, FaultKind::kUnmapped);
  met(DeviceOp::kTruncate, FaultKind::kRaise);
  met(DeviceOp::kTruncate, FaultKind::kEpoch);
  met(DeviceOp::kMapSlots, FaultKind::kMaxSeqLen);
  met(DeviceOp::kAcquire, FaultKind::kSlotTaken);
  for (const FaultKind kind :
       {FaultKind::kOpcode, FaultKind::kRaise, FaultKind::kCopyTokens, FaultKind::kCopyTwice, FaultKind::kCopyChain,
        FaultKind::kMaxSeqLen, FaultKind::kUnmapped, FaultKind::kUnwritten}) {
    met(DeviceOp::kAcquire, kind);
  }
}

TEST(CudaSlotsTest, RandomProgramsWithDropsGetTheSameAnswers) {
  std::set<std::string> kinds;
  for (int round = 0; round < 8; ++round) {
    const Layout layout = round % 2 == 0 ? Layout::kFused : Layout::kPerLayer;
    Twins twins(SmallGeometry(layout), layout == Layout::kFused ? 20 : 60, round % 3 == 0,
                static_cast<std::uint64_t>(round));
    for (int i = 0; i < 600 && !::testing::Test::HasFailure(); ++i) {
      RandomOp(twins, /*drops=*/true);
      EXPECT_OK(twins.pool().Audit()) << "op " << i;
      if (i % 8 == 0) twins.CompareState();
    }
    EXPECT_FALSE(::testing::Test::HasFailure()) << "round " << round;
    EXPECT_GT(twins.num_passed(), 150) << twins.num_passed();
    kinds.insert(twins.kinds().begin(), twins.kinds().end());
  }
  const auto met = [&](DeviceOp op, FaultKind kind) {
    EXPECT_EQ(kinds.count(std::string(OpName(op)) + " " + std::to_string(static_cast<int>(kind))), 1)
        << OpName(op) << " " << static_cast<int>(kind);
  };
  met(DeviceOp::kDropBefore, FaultKind::kDropBeyond);
  met(DeviceOp::kSetLengths, FaultKind::kBelowDropped);
  met(DeviceOp::kPagedAttention, FaultKind::kDropped);
}

// A cache of the newest epoch may show a released slot as occupied if it was derived from an older cache.
TEST(CudaSlotsTest, ReleasedSlotsHaveNoRoom) {
  Twins twins(SmallGeometry(), 20, /*allow_stale=*/true, 1);
  const Claim claim = twins.pool().Acquire({40, 40});
  EXPECT_OK(claim.status);
  twins.PublishRooms();
  EXPECT_EQ(twins.ChangeOwner(twins.value(), claim.slots, true), "");
  const Value before = twins.value();
  const std::int32_t gone = claim.slots[0], kept = claim.slots[1];
  EXPECT_OK(StartRelease(twins.pool(), {gone}));
  EXPECT_EQ(twins.ChangeOwner(twins.value(), {gone}, false), "");
  // The older cache itself is too old for that slot in every op.
  EXPECT_NE(twins.Begin(DeviceOp::kAppendKV, before, {{gone}, {0, 5}, 5}, 0).find("stale"), std::string::npos);
  EXPECT_NE(twins.Begin(DeviceOp::kPagedAttention, before, {{gone}, {0, 5}, 5}, 0).find("stale"), std::string::npos);
  EXPECT_NE(twins.Advance(before, {{kept, gone}, {0, 0, 0}, 0}).find("stale"), std::string::npos);
  EXPECT_NE(twins.SetLengths(before, {{kept, gone}, {0, 0}}).find("stale"), std::string::npos);
  EXPECT_NE(twins.MapSlots(before, {{gone}, {50}}).find("stale"), std::string::npos);
  for (const TokenCopy& copy : {TokenCopy{kept, gone, 0, 0}, TokenCopy{gone, kept, 0, 0}}) {
    EXPECT_NE(twins.EditSlots(DeviceOp::kAcquire, before, {}, {copy}).find("stale"), std::string::npos);
  }
  EXPECT_EQ(twins.Begin(DeviceOp::kAppendKV, before, {{kept}, {0, 5}, 5}, 0), "");
  EXPECT_EQ(twins.value().lengths[gone], 0);
  const std::string text = twins.Begin(DeviceOp::kAppendKV, twins.value(), {{gone}, {0, 5}, 5}, 0);
  EXPECT_NE(text.find("5 tokens wanted, 0 mapped"), std::string::npos) << text;
}

// Nothing remains of what the last occupant shared.
TEST(CudaSlotsTest, ReleasedSlotsShareNothing) {
  Twins twins(SmallGeometry(), 20, /*allow_stale=*/true, 1);
  const std::int32_t donor = twins.pool().Acquire({16}).slots.at(0);
  twins.PublishRooms();
  EXPECT_EQ(twins.ChangeOwner(twins.value(), {donor}, true), "");
  for (const std::int32_t layer : {0, 1}) {
    EXPECT_EQ(twins.Begin(DeviceOp::kAppendKV, twins.value(), {{donor}, {0, 16}, 16}, layer), "");
  }
  EXPECT_EQ(twins.Advance(twins.value(), {{donor}, {0, 16}, 16}), "");
  EXPECT_OK(twins.pool().Commit(donor, std::vector<std::int32_t>(16, 7)));
  const std::int32_t fork = twins.pool().Fork("fork", {{donor, -1}}, {}).slots.at(0);
  twins.PublishRooms();
  const SlotEdit edit = {static_cast<std::int32_t>(SlotOpcode::kFork), fork, 16, donor};
  EXPECT_EQ(twins.EditSlots(DeviceOp::kFork, twins.value(), {edit}, {{donor, fork, 16, 0}}), "");
  EXPECT_NE(twins.SetLengths(twins.value(), {{donor}, {8}}).find("its tokens below 16 are shared"), std::string::npos);
  EXPECT_OK(StartRelease(twins.pool(), {donor}));
  EXPECT_EQ(twins.ChangeOwner(twins.value(), {donor}, false), "");
  Value forged = twins.value();
  forged.lengths[donor] = 16;
  const std::string text = twins.SetLengths(forged, {{donor}, {8}});
  EXPECT_NE(text.find("8 tokens wanted, written in layers 0..1: 0"), std::string::npos) << text;
}

// More sequences than threads; also with more slots than there are marks in shared memory.
TEST(CudaSlotsTest, LargeBatches) {
  for (const int slots : {700, 9000}) {
    Geometry geometry;
    EXPECT_OK(Geometry::Make({2, 1, 16, slots, 32, 0, 0, 16}, 4096, &geometry));
    Twins twins(geometry, 1400, false, 3);
    emulation::device().seed = 5;
    const Claim claim = twins.pool().Acquire(std::vector<std::int64_t>(650, 20));
    EXPECT_OK(claim.status);
    twins.PublishRooms();
    EXPECT_EQ(twins.ChangeOwner(twins.value(), claim.slots, true), "");
    Ragged batch;
    batch.offsets.push_back(0);
    for (int s = 0; s < 600; ++s) {
      batch.slots.push_back(claim.slots[649 - s]);
      batch.offsets.push_back(batch.offsets.back() + s % 4);
    }
    batch.num_tokens = batch.offsets.back();
    for (int layer = 0; layer < 2; ++layer) {
      EXPECT_EQ(twins.Begin(DeviceOp::kAppendKV, twins.value(), batch, layer), "");
    }
    EXPECT_EQ(twins.Advance(twins.value(), batch), "");
    for (int i = 0; i < 30; ++i) {  // several mistakes at once: the first is reported
      Ragged wrong = batch;
      for (int mistakes = Pick(twins.rng(), 1, 4); mistakes > 0; --mistakes) {
        wrong.slots[twins.rng()() % 600] = Pick(twins.rng(), 0, 1) == 0 ? wrong.slots[twins.rng()() % 600] : slots + 5;
        if (Pick(twins.rng(), 0, 3) == 0) wrong.offsets[twins.rng()() % 600] += 1;
      }
      twins.Begin(DeviceOp::kAppendKV, twins.value(), wrong, 0);
      twins.Advance(twins.value(), wrong);
    }
    EXPECT_EQ(twins.ChangeOwner(twins.value(), claim.slots, true).empty(), false);
    EXPECT_OK(StartRelease(twins.pool(), claim.slots));
    EXPECT_EQ(twins.ChangeOwner(twins.value(), claim.slots, false), "");
    EXPECT_EQ(twins.rows().vacated(claim.slots[649]), 1u);
  }
  emulation::device().seed = 0;
}

}  // namespace
}  // namespace kvpage::testing
