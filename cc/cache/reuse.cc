// kernels/cuda/copy_rotated.cu makes the same checks and changes on a device.
#include "cache/reuse.h"

#include <algorithm>
#include <string>
#include <utility>

#include "cache/messages.h"
#include "cache/program_check.h"

namespace kvpage::reuse {
namespace {

constexpr const char* kVerb = "reuse_segment";

// Checks that each target is used by one copy only, and is not the source of any copy.
Status CheckTargets(SlotTable* table, const StateLock& state, const char* op, const SegmentList& list) {
  table->StartNaming(state);
  for (std::int64_t i = 0; i < list.num_copies; ++i) {
    const SegmentCopy& copy = list.copies[i];
    if (copy.source != -1 && !table->Name(state, copy.target)) return messages::CopyTwice(op, copy.target);
  }
  for (std::int64_t i = 0; i < list.num_copies; ++i) {
    const std::int32_t source = list.copies[i].source;
    if (source != -1 && table->Named(state, source)) return messages::CopyChain(op, source);
  }
  return {};
}

Status CheckRequest(const SlotTable& table, const StateLock& state, const SegmentCopy& copy) {
  KVPAGE_RETURN_IF_ERROR(table.CheckOccupied(state, kVerb, copy.source));
  KVPAGE_RETURN_IF_ERROR(table.CheckOccupied(state, kVerb, copy.target));
  if (copy.begin < 0 || copy.count < 0) return messages::CopyTokens(kVerb, copy.target, copy.begin, copy.count);
  const HostSlot& source = table.host(state, copy.source);
  if (const auto committed = static_cast<std::int64_t>(source.committed.size()); copy.end() > committed) {
    return OutOfRange(std::string(kVerb) + ": slot " + std::to_string(copy.source) + ": " + std::to_string(copy.end()) +
                      " tokens wanted, " + std::to_string(committed) +
                      " committed: commit(slot, token_ids) names tokens that are written");
  }
  if (copy.count > 0 && copy.begin < source.dropped) {
    return messages::Dropped(kVerb, copy.source, copy.begin, source.dropped);
  }
  return {};
}

// Checks that the copy can be made from this cache value. Does not look at the other copies' slots or their order.
Status CheckCopy(SlotTable* table, const StateLock& state, const ProgramCheck& check, const char* op,
                 const CacheRef& cache, const SegmentCopy& copy) {
  const Geometry& geometry = table->geometry();
  for (const std::int32_t slot : {copy.source, copy.target}) {
    if (slot < 0 || slot >= geometry.max_slots) return messages::SlotRange(op, slot, geometry.max_slots);
  }
  for (const std::int32_t slot : {copy.source, copy.target}) {
    KVPAGE_RETURN_IF_ERROR(check.Fresh(slot));
    if (cache.lengths[slot] < 0) return messages::SlotFree(op, slot);
  }
  if (copy.begin < 0 || copy.count < 0) return messages::CopyTokens(op, copy.target, copy.begin, copy.count);
  const std::int32_t length = cache.lengths[copy.target];
  const std::int64_t end = std::int64_t{length} + copy.count;
  if (end > geometry.max_seq_len) return messages::MaxSeqLen(op, copy.target, end, geometry.max_seq_len);
  const std::int64_t have = table->Room(state, copy.source), room = table->Room(state, copy.target);
  if (copy.end() > have) return messages::Unmapped(op, copy.source, copy.end(), have);
  if (end > room) return messages::Unmapped(op, copy.target, end, room);
  DeviceProgress& progress = table->progress(state);
  if (const std::int32_t dropped = progress.slots[copy.source].dropped; copy.count > 0 && copy.begin < dropped) {
    return messages::Dropped(op, copy.source, copy.begin, dropped);
  }
  if (const std::int32_t dropped = progress.slots[copy.target].dropped; copy.count > 0 && length < dropped) {
    return messages::Dropped(op, copy.target, length, dropped);
  }
  if (const std::int32_t shared = progress.slots[copy.target].shared; copy.count > 0 && length < shared) {
    return messages::Shared(op, copy.target, length, shared);
  }
  if (copy.end() > progress.WrittenInAllLayers(copy.source)) {
    return messages::UnwrittenSomewhere(op, copy.source, copy.end(), progress.Runs(copy.source));
  }
  // A gap would expose data of an earlier owner of the memory.
  if (length > progress.WrittenInAllLayers(copy.target)) {
    return messages::UnwrittenSomewhere(op, copy.target, length, progress.Runs(copy.target));
  }
  // The prefix index covers committed tokens: it would serve this segment as if it had been computed.
  if (copy.committed > length) return messages::CommittedAhead(op, copy.target, copy.committed, length);
  return {};
}

}  // namespace

Status Start(const PoolParts& pool, std::vector<SegmentCopy>* copies, std::vector<Mark>* before) {
  SlotTable& table = *pool.table;
  const StateLock state = table.Lock();
  KVPAGE_RETURN_IF_ERROR(Enter(pool, state, kVerb));
  for (const SegmentCopy& copy : *copies) KVPAGE_RETURN_IF_ERROR(CheckRequest(table, state, copy));
  const SegmentList list = {copies->data(), static_cast<std::int64_t>(copies->size())};
  KVPAGE_RETURN_IF_ERROR(CheckTargets(&table, state, kVerb, list));
  for (SegmentCopy& copy : *copies) {
    const HostSlot& target = table.host(state, copy.target);
    before->push_back({copy.target, target.exact});
    copy.committed = static_cast<std::int32_t>(target.committed.size());  // at most max_seq_len
    table.SetExact(state, copy.target, std::min<std::int64_t>(target.exact, copy.committed));
  }
  return {};
}

void Undo(const PoolParts& pool, const std::vector<Mark>& before) {
  const StateLock state = pool.table->Lock();
  for (const Mark& mark : before) {
    if (pool.table->host(state, mark.slot).state != SlotState::kOccupied) continue;
    pool.table->SetExact(state, mark.slot, mark.exact);
    pool.table->NoteCommit(state, mark.slot);
  }
}

Status CopyRotated(const PoolParts& pool, const char* op, const CacheRef& cache, const SegmentList& list,
                   PinnedSlots* pinned, std::uint32_t* epoch, std::int32_t* lengths, std::vector<std::int32_t>* to) {
  SlotTable& table = *pool.table;
  StateLock state = table.Lock();
  table.PassGate(&state);
  const ProgramCheck check(pool, state, op, cache);
  KVPAGE_RETURN_IF_ERROR(check.Begin(/*mutates=*/true));
  for (std::int64_t i = 0; i < list.num_copies; ++i) {
    if (list.copies[i].source == -1) continue;
    KVPAGE_RETURN_IF_ERROR(CheckCopy(&table, state, check, op, cache, list.copies[i]));
  }
  KVPAGE_RETURN_IF_ERROR(CheckTargets(&table, state, op, list));

  DeviceProgress& progress = table.progress(state);
  Pins pins;
  if (lengths != cache.lengths) std::copy_n(cache.lengths, table.num_slots(), lengths);
  to->assign(list.num_copies, 0);
  for (std::int64_t i = 0; i < list.num_copies; ++i) {
    const SegmentCopy& copy = list.copies[i];
    if (copy.source == -1) continue;
    std::int32_t& length = lengths[copy.target];
    (*to)[i] = length;
    pins.sequences.push_back({copy.source, 0, 0, 0});
    pins.sequences.push_back({copy.target, 0, copy.count, length});
    length += copy.count;
    progress.slots[copy.target].length = length;
  }
  *epoch = progress.NextEpoch();
  pins.written_layer = Pins::kAllLayers;
  pinned->Pin(state, &table, std::move(pins));
  return {};
}

}  // namespace kvpage::reuse
