// What programs do with a pool, called by the FFI handlers while a program runs.
//
// Everything a program says is checked against the cache value it carries (generation, epoch, lengths) and not against
// the host's table, which may be ahead of it.
#include <algorithm>
#include <string>

#include "cache/messages.h"
#include "cache/pool.h"

namespace kvpage {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }
std::string Prefix(const char* op) { return std::string(op) + ": "; }

}  // namespace

PinnedSlots::~PinnedSlots() {
  if (pool_ != nullptr) pool_->End(this);
}

Status Pool::CheckProgram(const char* op, const SpecInts& spec) const {
  KVPAGE_RETURN_IF_ERROR(CheckProcess(op));
  if (spec == geometry_.spec()) return {};
  return messages::OtherSpec(op, id_, spec, geometry_.spec());
}

std::int64_t Pool::Room(const Slot& slot) const {
  // Rounded up to whole blocks: that much is mapped and cannot be taken away.
  return std::min(geometry_.BlocksFor(slot.reserved) * geometry_.block_tokens, geometry_.max_seq_len);
}

std::uint32_t Pool::NextEpoch() {
  ++epoch_;
  if (MustRaiseStaleMarks(epoch_)) {
    for (Slot& slot : slots_) RaiseStaleMark(epoch_, &slot.since);
  }
  return epoch_;
}

Status Pool::CheckGeneration(const char* op, const CacheRef& cache, bool mutates) const {
  KVPAGE_RETURN_IF_ERROR(CheckOpen(op));
  if (cache.generation != generation_) return messages::OtherGeneration(op, id_, cache.generation, generation_);
  const bool stale = mutates && !options_.allow_stale && cache.epoch != epoch_;
  if (stale || Before(epoch_, cache.epoch)) return messages::StaleEpoch(op, id_, cache.epoch, epoch_);
  return {};
}

Status Pool::CheckSlot(const char* op, const CacheRef& cache, std::int32_t slot) {
  if (slot < 0 || slot >= geometry_.max_slots) return messages::SlotRange(op, slot, geometry_.max_slots);
  if (seen_[slot] == stamp_) return messages::SlotTwice(op, slot);
  seen_[slot] = stamp_;
  if (Before(cache.epoch, slots_[slot].since)) return messages::StaleSlot(op, slot, cache.epoch, slots_[slot].since);
  return {};
}

namespace {

Status CheckOffsets(const char* op, const BatchRef& batch) {
  const std::int32_t* offsets = batch.offsets;
  if (offsets[0] != 0) return messages::OffsetsStart(op, offsets[0]);
  for (std::int64_t s = 0; s < batch.num_sequences; ++s) {
    if (offsets[s + 1] < offsets[s]) return messages::OffsetsOrder(op, s, offsets[s], offsets[s + 1]);
  }
  const std::int32_t last = offsets[batch.num_sequences];
  if (batch.num_tokens >= 0 && last > batch.num_tokens) return messages::OffsetsEnd(op, last, batch.num_tokens);
  return {};
}

}  // namespace

Status Pool::CheckBatch(const char* op, const CacheRef& cache, const BatchRef& batch,
                        std::vector<Sequence>* sequences) {
  KVPAGE_RETURN_IF_ERROR(CheckOffsets(op, batch));
  ++stamp_;
  sequences->clear();
  for (std::int64_t s = 0; s < batch.num_sequences; ++s) {
    const std::int32_t slot = batch.slots[s];
    if (slot == -1) continue;
    KVPAGE_RETURN_IF_ERROR(CheckSlot(op, cache, slot));
    if (cache.lengths[slot] < 0) return messages::SlotFree(op, slot);
    const std::int32_t count = batch.offsets[s + 1] - batch.offsets[s];
    if (count == 0) continue;
    sequences->push_back({slot, batch.offsets[s], count, cache.lengths[slot]});
  }
  return {};
}

Status Pool::Begin(const char* op, const CacheRef& cache, const BatchRef& batch, std::int64_t layer, bool append,
                   PinnedSlots* pinned) {
  const std::lock_guard<std::mutex> state(state_mutex_);
  KVPAGE_RETURN_IF_ERROR(CheckGeneration(op, cache, append));
  if (layer < 0 || layer >= geometry_.num_layers) return messages::LayerRange(op, layer, geometry_.num_layers);
  KVPAGE_RETURN_IF_ERROR(CheckBatch(op, cache, batch, &pinned->sequences_));
  for (const Sequence& sequence : pinned->sequences_) {
    const Slot& row = slots_[sequence.slot];
    const std::int64_t end = std::int64_t{sequence.position} + sequence.query_length;
    if (end > geometry_.max_seq_len) return messages::MaxSeqLen(op, sequence.slot, end, geometry_.max_seq_len);
    if (end > Room(row)) return messages::Unmapped(op, sequence.slot, end, Room(row));
    if (!append && end > row.written[layer]) {
      return messages::Unwritten(op, sequence.slot, layer, end, row.written[layer]);
    }
  }
  pinned->pool_ = this;
  pinned->written_layer_ = append ? layer : -1;
  if (append) pinned->epoch_ = NextEpoch();
  for (const Sequence& sequence : pinned->sequences_) ++slots_[sequence.slot].pins;
  ++running_;
  return {};
}

void Pool::End(PinnedSlots* pinned) {
  const std::lock_guard<std::mutex> state(state_mutex_);
  for (const Sequence& sequence : pinned->sequences_) {
    Slot& row = slots_[sequence.slot];
    if (pinned->written_layer_ >= 0) {
      std::int32_t& written = row.written[pinned->written_layer_];
      written = std::max(written, sequence.position + sequence.query_length);
    }
    --row.pins;
    FinishDraining(sequence.slot);
  }
  --running_;
  changed_.notify_all();
}

Status Pool::MapSlots(const char* op, const CacheRef& cache, const std::int32_t* slots, const std::int32_t* tokens,
                      std::int64_t count, bool* ok, std::uint32_t* epoch) {
  bool enough = true;
  const auto check = [&](std::vector<Sequence>* sequences) -> Status {  // state_mutex_ held
    KVPAGE_RETURN_IF_ERROR(CheckGeneration(op, cache, true));
    ++stamp_;
    enough = true;
    for (std::int64_t i = 0; i < count; ++i) {
      ok[i] = true;
      if (slots[i] == -1) continue;
      KVPAGE_RETURN_IF_ERROR(CheckSlot(op, cache, slots[i]));
      if (cache.lengths[slots[i]] < 0) return messages::SlotFree(op, slots[i]);
      if (tokens[i] < 0 || tokens[i] > geometry_.max_seq_len) {
        return messages::MaxSeqLen(op, slots[i], tokens[i], geometry_.max_seq_len);
      }
      enough &= tokens[i] <= slots_[slots[i]].reserved;
      sequences->push_back({slots[i], 0, 0, 0});
    }
    return {};
  };
  PinnedSlots pinned;  // pins the slots: their owner stays while blocks are mapped without the state mutex
  {
    const std::lock_guard<std::mutex> state(state_mutex_);
    KVPAGE_RETURN_IF_ERROR(check(&pinned.sequences_));
    if (enough) {
      *epoch = NextEpoch();
      return {};
    }
  }
  // Pins are only ever taken with the mapping mutex already held here: AddView waits for pins while it holds it.
  const std::lock_guard<std::mutex> mapping(mapping_mutex_);
  {
    const std::lock_guard<std::mutex> state(state_mutex_);
    pinned.sequences_.clear();
    KVPAGE_RETURN_IF_ERROR(check(&pinned.sequences_));
    *epoch = NextEpoch();
    for (const Sequence& sequence : pinned.sequences_) ++slots_[sequence.slot].pins;
    ++running_;
    pinned.pool_ = this;
  }
  return MapPinned(op, slots, tokens, count, ok);
}

Status Pool::MapPinned(const char* op, const std::int32_t* slots, const std::int32_t* tokens, std::int64_t count,
                       bool* ok) {
  for (std::int64_t i = 0; i < count; ++i) {
    ok[i] = true;
    if (slots[i] == -1) continue;
    std::vector<Want> wants(1);
    {
      const std::lock_guard<std::mutex> state(state_mutex_);
      wants[0] = {slots[i], geometry_.BlocksFor(std::max<std::int64_t>(tokens[i], slots_[slots[i]].reserved))};
    }
    const std::vector<std::int64_t> before = Held(wants);
    Claim claim = Reserve(wants);
    if (claim.status.ok()) {
      claim.status = PublishRoom(wants, before);
    } else if (claim.status.code() == Code::kResourceExhausted) {
      ok[i] = false;
      continue;
    }
    if (!claim.status.ok()) {
      return {claim.status.code(), Prefix(op) + "slot " + Number(slots[i]) + ": " + claim.status.message()};
    }
    const std::lock_guard<std::mutex> state(state_mutex_);
    Slot& row = slots_[slots[i]];
    row.reserved = std::max<std::int64_t>(row.reserved, tokens[i]);
  }
  return {};
}

Status Pool::Advance(const char* op, const CacheRef& cache, const BatchRef& batch, std::uint32_t* epoch,
                     std::int32_t* lengths) {
  const std::lock_guard<std::mutex> state(state_mutex_);
  KVPAGE_RETURN_IF_ERROR(CheckGeneration(op, cache, true));
  std::vector<Sequence> sequences;
  KVPAGE_RETURN_IF_ERROR(CheckBatch(op, cache, batch, &sequences));
  for (const Sequence& sequence : sequences) {
    const std::int32_t written = slots_[sequence.slot].WrittenInAllLayers();
    // Otherwise a reader would find what an earlier owner of the memory left there.
    const std::int32_t end = sequence.position + sequence.query_length;
    if (end > written) return messages::UnwrittenSomewhere(op, sequence.slot, end, written);
  }
  if (lengths != cache.lengths) std::copy_n(cache.lengths, geometry_.max_slots, lengths);
  for (const Sequence& sequence : sequences) {
    lengths[sequence.slot] = slots_[sequence.slot].length = sequence.position + sequence.query_length;
  }
  *epoch = NextEpoch();
  return {};
}

Status Pool::SetLengths(const char* op, const CacheRef& cache, const std::int32_t* slots, const std::int32_t* values,
                        std::int64_t count, std::uint32_t* epoch, std::int32_t* lengths) {
  const std::lock_guard<std::mutex> state(state_mutex_);
  KVPAGE_RETURN_IF_ERROR(CheckGeneration(op, cache, true));
  ++stamp_;
  for (std::int64_t i = 0; i < count; ++i) {
    if (slots[i] == -1) continue;
    KVPAGE_RETURN_IF_ERROR(CheckSlot(op, cache, slots[i]));
    const std::int32_t length = cache.lengths[slots[i]];
    if (length < 0) return messages::SlotFree(op, slots[i]);
    if (values[i] < 0 || values[i] > length) {
      return messages::NotLowered(op, slots[i], values[i], length);
    }
  }
  const std::uint32_t next = NextEpoch();
  if (lengths != cache.lengths) std::copy_n(cache.lengths, geometry_.max_slots, lengths);
  for (std::int64_t i = 0; i < count; ++i) {
    if (slots[i] == -1) continue;
    Slot& row = slots_[slots[i]];
    if (values[i] < lengths[slots[i]]) row.since = next;
    for (std::int32_t& written : row.written) written = std::min(written, values[i]);
    lengths[slots[i]] = row.length = values[i];
  }
  *epoch = next;
  return {};
}

Status Pool::Occupy(const char* op, const CacheRef& cache, const std::int32_t* slots, std::int64_t count,
                    std::uint32_t* epoch, std::int32_t* lengths) {
  return ChangeOwner(op, cache, slots, count, /*occupy=*/true, epoch, lengths);
}

Status Pool::Vacate(const char* op, const CacheRef& cache, const std::int32_t* slots, std::int64_t count,
                    std::uint32_t* epoch, std::int32_t* lengths) {
  return ChangeOwner(op, cache, slots, count, /*occupy=*/false, epoch, lengths);
}

Status Pool::ChangeOwner(const char* op, const CacheRef& cache, const std::int32_t* slots, std::int64_t count,
                         bool occupy, std::uint32_t* epoch, std::int32_t* lengths) {
  const std::lock_guard<std::mutex> state(state_mutex_);
  KVPAGE_RETURN_IF_ERROR(CheckGeneration(op, cache, true));
  ++stamp_;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t slot = slots[i];
    if (slot == -1) continue;
    KVPAGE_RETURN_IF_ERROR(CheckSlot(op, cache, slot));
    const bool taken = cache.lengths[slot] >= 0;
    // The host may be ahead and have released a slot again that is only now occupied here: draining is fine.
    if (occupy && (taken || slots_[slot].state == SlotState::kFree)) {
      return messages::SlotTaken(op, slot, taken ? "already occupied in this cache" : "free in the pool");
    }
    if (!occupy && !taken) return messages::SlotFree(op, slot);
    if (!occupy && slots_[slot].state != SlotState::kDraining) {
      return FailedPrecondition(Prefix(op) + "slot " + Number(slot) + " was not released by the host");
    }
  }
  const std::uint32_t next = NextEpoch();
  if (lengths != cache.lengths) std::copy_n(cache.lengths, geometry_.max_slots, lengths);
  for (std::int64_t i = 0; i < count; ++i) {
    if (slots[i] == -1) continue;
    slots_[slots[i]].since = next;
    lengths[slots[i]] = occupy ? 0 : -1;
    if (occupy) continue;
    slots_[slots[i]].vacated = true;
    FinishDraining(slots[i]);
  }
  *epoch = next;
  return {};
}

}  // namespace kvpage
