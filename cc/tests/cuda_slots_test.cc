// The checks and the slot table's ops on the emulated device beside the pool on CPU: the same random programs, right
// and wrong, must get the same answers, in the same words, and leave the same state behind.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "tests/cuda_twins.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

std::int32_t AnySlot(Twins& t) {
  const auto slots = static_cast<int>(t.geometry().max_slots);
  const int kind = Pick(t.rng(), 0, 60);
  if (kind == 0) return slots;
  if (kind == 1) return -2;
  if (kind == 2) return 1 << 30;
  if (kind < 10) return -1;
  return Pick(t.rng(), 0, slots - 1);
}

std::vector<std::int32_t> Occupied(Twins& t) {
  std::vector<std::int32_t> slots;
  for (std::int32_t slot = 0; slot < t.geometry().max_slots; ++slot) {
    if (t.value().lengths[slot] >= 0) slots.push_back(slot);
  }
  std::shuffle(slots.begin(), slots.end(), t.rng());
  return slots;
}

// Mostly a batch that can run: distinct occupied slots, some padding.
Ragged RandomBatch(Twins& t, int at_most) {
  Rng& rng = t.rng();
  Ragged batch;
  const bool wild = Pick(rng, 0, 3) == 0;
  std::vector<std::int32_t> slots = Occupied(t);
  const int count = wild ? Pick(rng, 0, at_most) : Pick(rng, 0, static_cast<int>(slots.size()));
  batch.offsets.push_back(0);
  for (int s = 0; s < count; ++s) {
    batch.slots.push_back(wild ? AnySlot(t) : Pick(rng, 0, 9) == 0 ? -1 : slots[s]);
    batch.offsets.push_back(batch.offsets.back() + (Pick(rng, 0, 15) == 0 ? Pick(rng, 60, 140) : Pick(rng, 0, 9)));
  }
  batch.num_tokens = batch.offsets.back() + Pick(rng, 0, 3);
  if (!wild) return batch;
  for (int mistakes = Pick(rng, 0, 2); mistakes > 0; --mistakes) {
    const int kind = Pick(rng, 0, 3);
    if (kind == 0) batch.offsets[rng() % batch.offsets.size()] += Pick(rng, -3, 3);
    if (kind == 1) batch.offsets[0] = Pick(rng, -1, 1);
    if (kind == 2) batch.num_tokens = std::max(batch.offsets.back() - Pick(rng, 0, 2), 0);
    if (kind == 3 && count > 1) batch.slots[rng() % count] = batch.slots[rng() % count];
  }
  return batch;
}

Named RandomNamed(Twins& t, int most) {
  Rng& rng = t.rng();
  Named named;
  const bool wild = Pick(rng, 0, 3) == 0;
  const std::vector<std::int32_t> slots = Occupied(t);
  const int count = wild ? Pick(rng, 0, 5) : Pick(rng, 0, std::min<int>(3, static_cast<int>(slots.size())));
  for (int i = 0; i < count; ++i) {
    const std::int32_t slot = wild ? AnySlot(t) : slots[i];
    named.slots.push_back(slot);
    const std::int32_t length = t.Exists(slot) ? std::max(t.value().lengths[slot], 0) : 0;
    named.numbers.push_back(wild       ? (Pick(rng, 0, 2) - 1) * (most + 1)
                            : most > 0 ? Pick(rng, 0, most)
                                       : Pick(rng, 0, length));
  }
  return named;
}

void AcquireSome(Twins& t) {
  std::vector<std::int64_t> tokens(Pick(t.rng(), 1, 2));
  for (std::int64_t& n : tokens) n = Pick(t.rng(), 0, 70);
  const Claim claim = t.pool().Acquire(tokens);
  if (!claim.status.ok()) return;
  t.PublishRooms();
  for (const std::int32_t slot : claim.slots) t.rows().vacated(slot) = 0;
  std::vector<std::int32_t> slots = claim.slots;
  // With one that is taken, or does not exist; that one is free in the pool but was not acquired only the host knows.
  const std::int32_t other = AnySlot(t);
  const bool known = !t.Exists(other) || t.StateOf(other) != SlotState::kFree;
  if (known && Pick(t.rng(), 0, 4) == 0) slots.insert(slots.begin() + Pick(t.rng(), 0, 1), other);
  if (!t.ChangeOwner(t.PickValue(), slots, true).empty()) {
    UndoAcquire(t.pool(), claim.slots);
  }
}

void ReleaseSome(Twins& t) {
  std::vector<std::int32_t> slots = Occupied(t);
  slots.resize(std::min<std::size_t>(slots.size(), Pick(t.rng(), 0, 2)));
  if (!StartRelease(t.pool(), slots).ok()) return;
  std::vector<std::int32_t> named = slots;
  const std::int32_t other = AnySlot(t);
  // Not one that the host has not released: only the host knows that.
  if (!t.Exists(other) || (!t.allow_stale() && t.StateOf(other) == SlotState::kFree)) named.push_back(other);
  if (!slots.empty() && Pick(t.rng(), 0, 9) == 0) named.push_back(slots[0]);
  std::shuffle(named.begin(), named.end(), t.rng());
  if (!t.ChangeOwner(t.PickValue(), named, false).empty()) {
    UndoRelease(t.pool(), slots);
    return;
  }
  for (const std::int32_t slot : slots) EXPECT_EQ(t.rows().vacated(slot), 1u);
}

// Edits of every kind and copies in one list; mostly one that can run.
void EditSome(Twins& t) {
  Rng& rng = t.rng();
  const std::vector<std::int32_t> slots = Occupied(t);
  std::vector<SlotEdit> edits;
  std::vector<TokenCopy> copies;
  if (!slots.empty() && Pick(rng, 0, 1) == 0) {
    const std::int32_t slot = Pick(rng, 0, 9) == 0 ? AnySlot(t) : slots[0];
    const std::int32_t length = t.Exists(slot) ? t.value().lengths[slot] : 0;
    // Occupying and vacating are the host's to decide (AcquireSome, ReleaseSome); here only what does not exist.
    const bool known = Pick(rng, 0, 15) == 0;
    edits.push_back({known ? Pick(rng, 3, 5) : static_cast<std::int32_t>(SlotOpcode::kSetLength), slot,
                     length > 0 ? Pick(rng, 0, length + (Pick(rng, 0, 9) == 0)) : Pick(rng, -1, 0)});
    if (Pick(rng, 0, 3) == 0) edits.push_back({0, -1, 0});
    if (Pick(rng, 0, 12) == 0) edits.push_back(edits[0]);
  }
  const auto most = static_cast<int>(t.geometry().max_seq_len);
  for (int n = Pick(rng, 0, 3); n > 0 && !slots.empty(); --n) {
    const auto pick = [&] { return Pick(rng, 0, 15) == 0 ? AnySlot(t) : slots[rng() % slots.size()]; };
    TokenCopy copy = {pick(), pick(), 0, 0};
    const std::int32_t length = t.Exists(copy.source) ? std::max(t.value().lengths[copy.source], 0) : 0;
    copy.first = Pick(rng, 0, 2) == 0 ? Pick(rng, 0, length) : 0;
    copy.count = Pick(rng, 0, std::max(length - copy.first, 0));
    if (Pick(rng, 0, 9) == 0) copy.count = Pick(rng, 0, 1) == 0 ? Pick(rng, 0, most) : Pick(rng, 0, 1) * (most + 2) - 1;
    if (Pick(rng, 0, 23) == 0) copy.first = Pick(rng, -2, most + 1);
    copies.push_back(copy);
    if (Pick(rng, 0, 4) == 0) copies.push_back({-1, -1, -1, -1});
  }
  const DeviceOp op = Pick(rng, 0, 1) == 0 ? DeviceOp::kAcquire : DeviceOp::kRelease;
  t.EditSlots(op, t.PickForged(), edits, copies);
}

void RandomOp(Twins& t) {
  Rng& rng = t.rng();
  const auto layers = static_cast<int>(t.geometry().num_layers);
  const int layer = Pick(rng, 0, 24) == 0 ? Pick(rng, -1, layers) : Pick(rng, 0, layers - 1);
  switch (Pick(rng, 0, 13)) {
    case 0:
    case 1:
      return AcquireSome(t);
    case 2:
      return ReleaseSome(t);
    case 3: {
      const std::vector<std::int32_t> slots = Occupied(t);
      if (slots.empty()) return;
      static_cast<void>(t.pool().Extend({slots[0]}, {Pick(rng, 1, 128)}));
      return t.PublishRooms();
    }
    case 4:
      t.Begin(DeviceOp::kAppendKV, t.PickForged(), RandomBatch(t, 6), layer);
      return;
    case 5:
      t.Begin(DeviceOp::kPagedAttention, t.PickForged(), RandomBatch(t, 6), layer);
      return;
    case 6: {  // a whole step, of which one part may be missing
      const Ragged batch = RandomBatch(t, 6);
      const int left_out = Pick(rng, 0, 5 * layers);
      for (int l = 0; l < layers; ++l) {
        if (l != left_out) t.Begin(DeviceOp::kAppendKV, t.value(), batch, l);
      }
      t.Advance(t.PickForged(), batch);
      return;
    }
    case 7:
      t.Advance(t.PickForged(), RandomBatch(t, 6));
      return;
    case 8:
      t.SetLengths(t.PickForged(), RandomNamed(t, 0));
      return;
    case 9:
      t.MapSlots(t.PickForged(), RandomNamed(t, static_cast<int>(t.geometry().max_seq_len)));
      return;
    case 10:
      if (Pick(rng, 0, 4) == 0) t.NewGeneration();
      return;
    case 11:
    case 12:
      return EditSome(t);
    default: {  // reads what was written
      const std::vector<std::int32_t> slots = Occupied(t);
      if (slots.empty()) return;
      t.Begin(DeviceOp::kPagedAttention, t.PickForged(), {{slots[0]}, {0, 1}, 1}, layer);
      return;
    }
  }
}

TEST(CudaSlotsTest, RandomProgramsGetTheSameAnswers) {
  std::set<std::string> kinds;
  for (int round = 0; round < 12; ++round) {
    emulation::device().seed = static_cast<std::uint64_t>(round) % 4;
    const Layout layout = round % 2 == 0 ? Layout::kFused : Layout::kPerLayer;
    Twins twins(SmallGeometry(layout), layout == Layout::kFused ? 20 : 60, round % 3 == 0,
                static_cast<std::uint64_t>(round), /*debug=*/round % 3 == 1);
    for (int i = 0; i < 600 && !::testing::Test::HasFailure(); ++i) {
      RandomOp(twins);
      if (i % 4 == 0) twins.CompareState();
    }
    EXPECT_FALSE(::testing::Test::HasFailure()) << "round " << round;
    EXPECT_GT(twins.num_passed(), 150) << twins.num_passed();
    kinds.insert(twins.kinds().begin(), twins.kinds().end());
  }
  emulation::device().seed = 0;
  // Every fault that the pool's own state can bring about has been met.
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
  met(DeviceOp::kMapSlots, FaultKind::kMaxSeqLen);
  met(DeviceOp::kAcquire, FaultKind::kSlotTaken);
  for (const FaultKind kind :
       {FaultKind::kOpcode, FaultKind::kRaise, FaultKind::kCopyTokens, FaultKind::kCopyTwice, FaultKind::kCopyChain,
        FaultKind::kMaxSeqLen, FaultKind::kUnmapped, FaultKind::kUnwritten}) {
    met(DeviceOp::kAcquire, kind);
  }
}

// A cache of the newest epoch may show a released slot as taken, when it went on from an older one.
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
  // The older cache itself is too old for that slot, in every op.
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

// More sequences than threads; with more slots than marks in shared memory too.
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
    for (int i = 0; i < 30; ++i) {  // several mistakes in one: the first is reported
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
