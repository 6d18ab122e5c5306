// Programs that pass random values to the core: lengths, slots, offsets, epochs, generations, layers. Every op runs on
// the pool and on the emulated device. Each occupant stamps what it appends, and forks have their donors' stamps. A
// read that passes must find only stamps of its own sequence; memory of earlier requests carries others.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "tests/cuda_twins.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

constexpr std::int32_t kMin = std::numeric_limits<std::int32_t>::min(), kMax = std::numeric_limits<std::int32_t>::max();

class Fuzz {
 public:
  Fuzz(Layout layout, bool allow_stale, std::uint64_t seed)
      : t_(SmallGeometry(layout), layout == Layout::kFused ? 20 : 60, allow_stale, seed), owners_(kSlots, 0.0f) {
    stamps_.assign(kSlots, Stamps(2 * kMaxTokens, kNothing));
  }

  std::int64_t num_passed() const { return t_.num_passed(); }
  std::int64_t num_refused() const { return refused_; }
  std::int64_t num_moved() const { return moved_; }

  void Run() {
    const std::int64_t before = t_.num_passed();
    switch (Pick(rng(), 0, 13)) {
      case 0:
        return Acquire();
      case 1:
        return Release();
      case 2:
        if (Pick(rng(), 0, 3) == 0) t_.NewGeneration();
        return;
      case 3:
      case 4:
        return Step();
      case 5:
        return Settle(t_.Advance(AnyValue(), AnyBatch()), before);
      case 6:
        return Settle(t_.SetLengths(AnyValue(), AnyNumbers()), before);
      case 7:
        Settle(t_.MapSlots(AnyValue(), AnyNumbers()), before);
        return t_.PublishRooms();
      case 8:
      case 9:
        return Append(AnyValue(), AnyBatch(), AnyLayer());
      case 10:
        return Fork();
      case 11:
        return Truncate();
      default:
        return Read(AnyValue(), AnyBatch(), AnyLayer());
    }
  }

  // Moves at most `most` idle blocks, which no program may notice.
  void Relocate(std::int64_t most) {
    relocation::Report report;
    EXPECT_OK(t_.pool().Relocate({4096 * most, true, {}, false}, &report));
    EXPECT_OK(t_.pool().Audit());
    moved_ += report.blocks_moved;
  }

 private:
  Rng& rng() { return t_.rng(); }
  bool Rarely() { return Pick(rng(), 0, 11) == 0; }
  std::int32_t Wild() {
    const std::int32_t edges[] = {kMin, kMin + 1, -2, -1, 0, 1, 127, 128, 129, 1 << 30, kMax - 1, kMax};
    return Pick(rng(), 0, 2) > 0 ? Pick(rng(), 0, 140) : edges[rng()() % 12];
  }

  Value AnyValue() {
    Value value = t_.value();
    if (Rarely()) value.generation = Pick(rng(), 0, 1) == 0 ? Wild() : value.generation - 1;
    if (Rarely()) value.epoch = Pick(rng(), 0, 1) == 0 ? static_cast<std::uint32_t>(rng()()) : value.epoch - 1;
    for (std::int32_t& length : value.lengths) {
      if (Pick(rng(), 0, 4) == 0) length = Wild();
    }
    return value;
  }
  std::int32_t AnyLayer() { return Rarely() ? Wild() : Pick(rng(), 0, 1); }
  std::vector<std::int32_t> AnySlots() {
    std::vector<std::int32_t> slots(kSlots);
    for (std::int32_t slot = 0; slot < kSlots; ++slot) slots[slot] = slot;
    std::shuffle(slots.begin(), slots.end(), rng());
    slots.resize(static_cast<std::size_t>(Pick(rng(), 0, kSlots)));
    for (std::int32_t& slot : slots) {
      if (Rarely()) slot = Wild();
    }
    return slots;
  }
  Ragged AnyBatch() {
    Ragged batch;
    batch.slots = AnySlots();
    batch.offsets = {0};
    for (std::size_t s = 0; s < batch.slots.size(); ++s) batch.offsets.push_back(batch.offsets[s] + Pick(rng(), 0, 9));
    batch.num_tokens = batch.offsets.back() + Pick(rng(), 0, 3);
    if (Rarely()) batch.offsets[rng()() % batch.offsets.size()] = Wild();
    return batch;
  }
  Named AnyNumbers() {
    Named named;
    named.slots = AnySlots();
    for (std::size_t i = 0; i < named.slots.size(); ++i) named.numbers.push_back(Wild());
    return named;
  }

  // A refusal must say why. An op that passed may have used a cache with changed lengths: restart from the pool's
  // record.
  void Settle(const std::string& text, std::int64_t passed_before) {
    EXPECT_EQ(text.empty(), t_.num_passed() > passed_before) << text;
    refused_ += text.empty() ? 0 : 1;
    if (text.empty()) t_.NewGeneration();
  }

  void Acquire() {
    const Claim claim = t_.pool().Acquire({Pick(rng(), 0, 100)});
    if (!claim.status.ok()) return;
    t_.PublishRooms();
    const std::int32_t slot = claim.slots[0];
    t_.rows().vacated(slot) = 0;
    EXPECT_EQ(t_.ChangeOwner(t_.value(), {slot}, true), "");
    owners_[slot] = ++last_owner_;
    stamps_[slot].assign(2 * kMaxTokens, kNothing);
  }
  // A new occupant that has its first tokens from another slot.
  void Fork() {
    const auto donor = Pick(rng(), 0, kSlots - 1);
    const std::int32_t length = t_.value().lengths[donor];
    const auto committed = static_cast<std::int32_t>(t_.pool().Committed(donor).size());
    if (length > committed) {
      static_cast<void>(t_.pool().Commit(donor, std::vector<std::int32_t>(length - committed, 7)));
    }
    const Claim claim = t_.pool().Fork("fork", {{donor, -1}}, {});
    t_.PublishRooms();
    if (!claim.status.ok()) return;
    const std::int32_t slot = claim.slots[0], tokens = static_cast<std::int32_t>(claim.tokens[0]);
    const std::int32_t whole = tokens / 16 * 16;
    t_.rows().vacated(slot) = 0;
    const SlotEdit edit = {static_cast<std::int32_t>(SlotOpcode::kFork), slot, tokens, donor};
    EXPECT_EQ(t_.EditSlots(DeviceOp::kFork, t_.value(), {edit}, {{donor, slot, whole, tokens - whole}}), "");
    owners_[slot] = ++last_owner_;
    stamps_[slot].assign(2 * kMaxTokens, kNothing);
    std::copy_n(stamps_[donor].begin(), 2 * tokens, stamps_[slot].begin());
  }
  void Truncate() {
    const auto slot = Pick(rng(), 0, kSlots - 1);
    const std::int32_t tokens = Pick(rng(), 0, std::max(t_.value().lengths[slot], 0));
    const bool ok = t_.pool().Truncate({slot}, {tokens}).status.ok();
    t_.PublishRooms();
    if (!ok) return;
    const SlotEdit edit = {static_cast<std::int32_t>(SlotOpcode::kTruncate), slot, tokens};
    EXPECT_EQ(t_.EditSlots(DeviceOp::kTruncate, t_.value(), {edit}, {}), "");
  }
  void Release() {
    const auto slot = Pick(rng(), 0, kSlots - 1);
    if (!StartRelease(t_.pool(), {slot}).ok()) return;
    EXPECT_EQ(t_.ChangeOwner(t_.value(), {slot}, false), "");
    owners_[slot] = 0.0f;
  }

  // Runs a valid step of one sequence, so that there is something to read.
  void Step() {
    const auto slot = Pick(rng(), 0, kSlots - 1);
    const std::int32_t length = t_.value().lengths[slot];
    const std::int32_t room = length < 0 ? 0 : t_.rows().slot(slot).room - length;
    // A cache with forged lengths may have cut the sequence below what it shares.
    if (room <= 0 || length < t_.rows().slot(slot).shared) return;
    const std::int32_t count = std::min(room, Pick(rng(), 1, 20));
    const Ragged batch = {{slot}, {0, count}, count};
    for (std::int32_t layer = 0; layer < 2; ++layer) Append(t_.value(), batch, layer);
    EXPECT_EQ(t_.Advance(t_.value(), batch), "");
  }

  template <class Fn>
  void ForRows(const Value& value, const Ragged& batch, std::int32_t layer, bool from_start, Fn&& fn) {
    const KVView view = t_.pool().View();
    for (std::size_t s = 0; s < batch.slots.size(); ++s) {
      const std::int32_t slot = batch.slots[s], count = batch.offsets[s + 1] - batch.offsets[s];
      if (slot < 0 || count == 0) continue;
      const std::int32_t length = value.lengths[slot];
      for (std::int32_t token = from_start ? 0 : length; token < length + count; ++token) {
        for (const int kv : {0, 1}) fn(reinterpret_cast<float*>(view.At(slot, token, layer, kv, 0)), slot, token);
      }
    }
  }
  void Append(const Value& value, const Ragged& batch, std::int32_t layer) {
    const std::int64_t before = t_.num_passed();
    const bool right = value.lengths == t_.value().lengths;
    const std::string text = t_.Begin(DeviceOp::kAppendKV, value, batch, layer);
    if (text.empty()) {
      ForRows(value, batch, layer, false, [&](float* row, std::int32_t slot, std::int32_t token) {
        EXPECT_GT(owners_[slot], 0.0f) << "slot " << slot << " is nobody's";
        *row = stamps_[slot][2 * token + layer] = owners_[slot];
      });
    }
    if (!right || !text.empty()) Settle(text, before);
  }
  void Read(const Value& value, const Ragged& batch, std::int32_t layer) {
    const std::int64_t before = t_.num_passed();
    const std::string text = t_.Begin(DeviceOp::kPagedAttention, value, batch, layer);
    EXPECT_EQ(text.empty(), t_.num_passed() > before);
    refused_ += text.empty() ? 0 : 1;
    if (!text.empty()) return;
    ForRows(value, batch, layer, true, [&](const float* row, std::int32_t slot, std::int32_t token) {
      EXPECT_EQ(*row, stamps_[slot][2 * token + layer])
          << "slot " << slot << ", token " << token << ": another request's";
    });
  }

  using Stamps = std::vector<float>;  // [tokens, layers]
  static constexpr std::int32_t kMaxTokens = 128;
  static constexpr float kNothing = -1.0f;

  Twins t_;
  std::vector<float> owners_;   // the stamp of each slot's occupant, or 0 if there is none
  std::vector<Stamps> stamps_;  // [slots] what the occupant, or those it was forked from, have written
  float last_owner_ = 0.0f;
  std::int64_t refused_ = 0, moved_ = 0;
};

TEST(ProgramFuzzTest, NothingIsReadThatTheOccupantHasNotWritten) {
  std::int64_t passed = 0, refused = 0, moved = 0;
  for (int round = 0; round < 20 && !::testing::Test::HasFailure(); ++round) {
    emulation::device().seed = static_cast<std::uint64_t>(round) % 4;
    Fuzz fuzz(round % 2 == 0 ? Layout::kFused : Layout::kPerLayer, round % 3 == 0, static_cast<std::uint64_t>(round));
    for (int i = 0; i < 700 && !::testing::Test::HasFailure(); ++i) {
      fuzz.Run();
      if (i % 5 == 0) fuzz.Relocate(i % 31);
    }
    EXPECT_FALSE(::testing::Test::HasFailure()) << "round " << round;
    passed += fuzz.num_passed();
    refused += fuzz.num_refused();
    moved += fuzz.num_moved();
  }
  emulation::device().seed = 0;
  EXPECT_GT(passed, 2000);
  EXPECT_GT(refused, 2000);
  EXPECT_GT(moved, 100);
  EXPECT_GT(passed + refused, 10000);
}

}  // namespace
}  // namespace kvpage::testing
