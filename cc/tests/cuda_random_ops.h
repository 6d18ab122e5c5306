// Random valid and invalid ops on twins: batches, named slots, edits, forks, truncations.
#ifndef KVPAGE_TESTS_CUDA_RANDOM_OPS_H_
#define KVPAGE_TESTS_CUDA_RANDOM_OPS_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tests/cuda_twins.h"

namespace kvpage::testing {

inline std::int32_t AnySlot(Twins& t) {
  const auto slots = static_cast<int>(t.geometry().max_slots);
  const int kind = Pick(t.rng(), 0, 60);
  if (kind == 0) return slots;
  if (kind == 1) return -2;
  if (kind == 2) return 1 << 30;
  if (kind < 10) return -1;
  return Pick(t.rng(), 0, slots - 1);
}

inline std::vector<std::int32_t> Occupied(Twins& t) {
  std::vector<std::int32_t> slots;
  for (std::int32_t slot = 0; slot < t.geometry().max_slots; ++slot) {
    if (t.value().lengths[slot] >= 0) slots.push_back(slot);
  }
  std::shuffle(slots.begin(), slots.end(), t.rng());
  return slots;
}

// Returns a batch that is mostly valid: distinct occupied slots, some padding.
inline Ragged RandomBatch(Twins& t, int at_most) {
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
    if (kind == 0) batch.offsets[rng() % batch.offsets.size()] += Pick(rng, -12, 12);
    if (kind == 1) batch.offsets[0] = Pick(rng, -1, 1);
    if (kind == 2) batch.num_tokens = std::max(batch.offsets.back() - Pick(rng, 0, 2), 0);
    if (kind == 3 && count > 1) batch.slots[rng() % count] = batch.slots[rng() % count];
  }
  return batch;
}

inline Named RandomNamed(Twins& t, int most) {
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

inline void AcquireSome(Twins& t) {
  std::vector<std::int64_t> tokens(Pick(t.rng(), 1, 2));
  for (std::int64_t& n : tokens) n = Pick(t.rng(), 0, 70);
  const Claim claim = t.pool().Acquire(tokens);
  if (!claim.status.ok()) return;
  t.PublishRooms();
  for (const std::int32_t slot : claim.slots) t.rows().vacated(slot) = 0;
  std::vector<std::int32_t> slots = claim.slots;
  // Add a slot that is occupied or does not exist. (Only the host knows that a slot is free but was not acquired.)
  const std::int32_t other = AnySlot(t);
  const bool known = !t.Exists(other) || t.StateOf(other) != SlotState::kFree;
  if (known && Pick(t.rng(), 0, 4) == 0) slots.insert(slots.begin() + Pick(t.rng(), 0, 1), other);
  if (!t.ChangeOwner(t.PickValue(), slots, true).empty()) {
    UndoAcquire(t.pool(), claim.slots);
  }
}

inline void ReleaseSome(Twins& t) {
  std::vector<std::int32_t> slots = Occupied(t);
  slots.resize(std::min<std::size_t>(slots.size(), Pick(t.rng(), 0, 2)));
  if (!StartRelease(t.pool(), slots).ok()) return;
  std::vector<std::int32_t> named = slots;
  const std::int32_t other = AnySlot(t);
  // Not a slot that the host has not released, because only the host knows that.
  if (!t.Exists(other) || (!t.allow_stale() && t.StateOf(other) == SlotState::kFree)) named.push_back(other);
  if (!slots.empty() && Pick(t.rng(), 0, 9) == 0) named.push_back(slots[0]);
  std::shuffle(named.begin(), named.end(), t.rng());
  std::vector<std::uint32_t> vacated;
  for (const std::int32_t slot : slots) {
    std::int32_t written = t.rows().written(slot, 0);
    for (std::int64_t l = 1; l < t.geometry().num_layers; ++l) written = std::min(written, t.rows().written(slot, l));
    vacated.push_back(static_cast<std::uint32_t>(written) + 1);
  }
  if (!t.ChangeOwner(t.PickValue(), named, false).empty()) {
    UndoRelease(t.pool(), slots);
    return;
  }
  for (std::size_t i = 0; i < slots.size(); ++i) EXPECT_EQ(t.rows().vacated(slots[i]), vacated[i]);
}

// Edits of every kind and copies in one list, mostly valid.
inline void EditSome(Twins& t) {
  Rng& rng = t.rng();
  const std::vector<std::int32_t> slots = Occupied(t);
  std::vector<SlotEdit> edits;
  std::vector<TokenCopy> copies;
  if (!slots.empty() && Pick(rng, 0, 1) == 0) {
    const std::int32_t slot = Pick(rng, 0, 9) == 0 ? AnySlot(t) : slots[0];
    const std::int32_t length = t.Exists(slot) ? t.value().lengths[slot] : 0;
    // The host decides about occupying and vacating (AcquireSome, ReleaseSome); here only opcodes that do not exist.
    const bool unknown = Pick(rng, 0, 15) == 0;
    edits.push_back({unknown ? Pick(rng, static_cast<int>(SlotOpcode::kSwapIn) + 1, 12)
                             : static_cast<std::int32_t>(SlotOpcode::kSetLength),
                     slot, length > 0 ? Pick(rng, 0, length + (Pick(rng, 0, 9) == 0)) : Pick(rng, -1, 0)});
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

// A fork of committed tokens as the host queues it, sometimes with a mistake in the list.
inline void ForkSome(Twins& t) {
  Rng& rng = t.rng();
  const std::vector<std::int32_t> slots = Occupied(t);
  if (slots.empty()) return;
  const std::int32_t donor = slots[0];
  if (Pick(rng, 0, 1) == 0) {  // with full blocks
    static_cast<void>(t.pool().Extend({donor}, {48}));
    t.PublishRooms();
    const std::int32_t count = std::min(20, t.rows().slot(donor).room - t.value().lengths[donor]);
    const Ragged batch = {{donor}, {0, std::max(count, 0)}, std::max(count, 0)};
    for (int layer = 0; layer < 2; ++layer) t.Begin(DeviceOp::kAppendKV, t.value(), batch, layer);
    t.Advance(t.value(), batch);
  }
  const auto have = static_cast<int>(t.pool().Committed(donor).size());
  // Sometimes more tokens than programs have written.
  const int more = t.value().lengths[donor] + (Pick(rng, 0, 5) == 0 ? Pick(rng, 0, 20) : 0) - have;
  if (more > 0) static_cast<void>(t.pool().Commit(donor, std::vector<std::int32_t>(Pick(rng, 0, more), 7)));
  const Claim claim = t.pool().Fork("fork", {{donor, Pick(rng, 0, 3) == 0 ? -1 : Pick(rng, 0, have)}}, {});
  t.PublishRooms();
  if (!claim.status.ok()) return;
  const std::int32_t slot = claim.slots[0], tokens = static_cast<std::int32_t>(claim.tokens[0]);
  t.rows().vacated(slot) = 0;
  const auto whole = tokens - tokens % static_cast<std::int32_t>(t.geometry().block_tokens);
  const SlotEdit right = {static_cast<std::int32_t>(SlotOpcode::kFork), slot, tokens, donor};
  std::vector<SlotEdit> edits = {right};
  std::vector<TokenCopy> copies = {{donor, slot, whole, tokens - whole}};
  const int mistake = Pick(rng, 0, 15);
  if (mistake == 0) edits[0].donor = AnySlot(t);
  if (mistake == 1) edits[0].length = Pick(rng, -1, 140);
  if (mistake == 2) edits.push_back({static_cast<std::int32_t>(SlotOpcode::kSetLength), donor, 0});
  if (mistake == 3) edits[0].donor = slot;
  if (mistake == 4) edits.push_back({static_cast<std::int32_t>(SlotOpcode::kSetLength), AnySlot(t), 3});
  if (mistake == 5) copies[0].first = Pick(rng, 0, 40);
  if (mistake == 6) edits.insert(edits.begin(), {0, -1, 0});
  if (mistake == 7) edits.push_back(edits[0]);
  if (t.EditSlots(DeviceOp::kFork, t.PickValue(), edits, copies).empty()) {
    if (whole == 0 || edits[0].length != tokens) return;
    // A program that changes the cache's lengths in order to overwrite shared tokens.
    Value forged = t.value();
    const std::int32_t writer = Pick(rng, 0, 1) == 0 ? donor : slot;
    forged.lengths[writer] = Pick(rng, 0, whole - 1);
    EXPECT_NE(t.Begin(DeviceOp::kAppendKV, forged, {{writer}, {0, 1}, 1}, 0), "");
    return;
  }
  t.pool().UndoEdits({right});
  t.PublishRooms();
}

// Requests with equal beginnings, as the host queues them, sometimes with a mistake in the list. ForkSome commits what
// they write.
inline void AcquirePrefixes(Twins& t) {
  Rng& rng = t.rng();
  std::vector<prefix::Request> requests(static_cast<std::size_t>(Pick(rng, 1, 2)));
  for (prefix::Request& request : requests) {
    request.ids.assign(static_cast<std::size_t>(Pick(rng, 0, 60)), 7);
    request.tokens = Pick(rng, 0, 70);
  }
  prefix::Options options;
  options.followers = Pick(rng, 0, 1) == 0;
  const Claim claim = t.pool().AcquirePrefix(requests, options);
  t.PublishRooms();
  if (!claim.status.ok()) return;
  std::vector<SlotEdit> edits;
  std::vector<TokenCopy> copies;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const std::int32_t slot = claim.slots[i], donor = claim.sources[i];
    if (slot < 0) continue;
    t.rows().vacated(slot) = 0;
    const auto found = static_cast<std::int32_t>(claim.tokens[i]), shared = static_cast<std::int32_t>(claim.shared[i]);
    const SlotOpcode opcode = donor >= 0 ? SlotOpcode::kFork : found > 0 ? SlotOpcode::kFound : SlotOpcode::kOccupy;
    edits.push_back({static_cast<std::int32_t>(opcode), slot, found, donor});
    if (donor >= 0) copies.push_back({donor, slot, shared, found - shared});
  }
  const std::vector<SlotEdit> right = edits;
  const int mistake = Pick(rng, 0, 9);
  if (mistake == 0 && !edits.empty()) edits[0].length = Pick(rng, 0, 1) == 0 ? -1 : 140;
  if (mistake == 1 && !edits.empty()) {
    const std::int32_t other = AnySlot(t);
    // Only the host knows that a slot is free but was not acquired.
    if (!t.Exists(other) || t.StateOf(other) != SlotState::kFree) edits[0].slot = other;
  }
  if (t.EditSlots(DeviceOp::kAcquirePrefix, t.PickValue(), edits, copies).empty()) {
    const SlotEdit edit = edits.empty() ? SlotEdit() : edits[0];
    if (edit.opcode != static_cast<std::int32_t>(SlotOpcode::kFound) || edit.slot < 0) return;
    // A program that changes the cache's lengths in order to overwrite what was found.
    Value forged = t.value();
    forged.lengths[edit.slot] = Pick(rng, 0, edit.length - 1);
    EXPECT_NE(t.Begin(DeviceOp::kAppendKV, forged, {{edit.slot}, {0, 1}, 1}, 0), "");
    return;
  }
  t.pool().UndoEdits(right);
  t.PublishRooms();
}

inline void TruncateSome(Twins& t) {
  Rng& rng = t.rng();
  const std::vector<std::int32_t> slots = Occupied(t);
  if (slots.empty()) return;
  const std::int32_t slot = slots[0], length = t.value().lengths[slot];
  const std::int32_t tokens = Pick(rng, 0, length + (Pick(rng, 0, 9) == 0));
  const Claim claim = t.pool().Truncate({slot}, {tokens});
  t.PublishRooms();
  if (!claim.status.ok()) return;
  const SlotEdit edit = {static_cast<std::int32_t>(SlotOpcode::kTruncate), slot, tokens};
  if (t.EditSlots(DeviceOp::kTruncate, t.PickValue(), {edit}, {}).empty()) return;
  t.pool().UndoEdits({edit});
  t.PublishRooms();
}

inline void DropSome(Twins& t) {
  Rng& rng = t.rng();
  const std::vector<std::int32_t> slots = Occupied(t);
  if (slots.empty()) return;
  const std::int32_t slot = slots[0], length = t.value().lengths[slot];
  std::vector<std::int64_t> dropped;
  const Status status = t.pool().DropBefore({slot}, {Pick(rng, 0, length + 20 * (Pick(rng, 0, 9) == 0))}, &dropped);
  if (!status.ok() || dropped[0] == 0) return;
  const SlotEdit edit = {static_cast<std::int32_t>(SlotOpcode::kDrop), slot, static_cast<std::int32_t>(dropped[0])};
  if (t.EditSlots(DeviceOp::kDropBefore, t.PickValue(), {edit}, {}).empty()) return;
  t.pool().UndoEdits({edit});
}

// With `drops`, drops take the place of prefixes.
inline void RandomOp(Twins& t, bool drops = false) {
  Rng& rng = t.rng();
  const auto layers = static_cast<int>(t.geometry().num_layers);
  const int layer = Pick(rng, 0, 24) == 0 ? Pick(rng, -1, layers) : Pick(rng, 0, layers - 1);
  const int op = Pick(rng, 0, 17);
  if (drops && (op == 15 || op == 16)) return DropSome(t);
  switch (op) {
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
    case 6: {  // a whole step, one part of which may be missing
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
      for (int n = 0; n < 3; ++n) t.SetLengths(t.PickForged(), RandomNamed(t, 0));
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
    case 13:
      return ForkSome(t);
    case 14:
      return TruncateSome(t);
    case 15:
    case 16:
      return AcquirePrefixes(t);
    default: {  // reads what was written
      const std::vector<std::int32_t> slots = Occupied(t);
      if (slots.empty()) return;
      t.Begin(DeviceOp::kPagedAttention, t.PickForged(), {{slots[0]}, {0, 1}, 1}, layer);
      return;
    }
  }
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_CUDA_RANDOM_OPS_H_
