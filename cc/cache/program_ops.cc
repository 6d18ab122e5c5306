#include "cache/program_ops.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "cache/messages.h"
#include "cache/program_check.h"

namespace kvpage::program_ops {
namespace {

// Sets the end of sequences whose new tokens have limits to the last limit. (Positions may become negative, since there
// may be fewer keys than new tokens.)
Status EndAtLimits(const char* op, const std::int32_t* limits, std::vector<Sequence>* sequences) {
  for (Sequence& sequence : *sequences) {
    const std::int32_t* const own = limits + sequence.query_begin;
    std::int32_t before = 0;
    for (std::int32_t i = 0; i < sequence.query_length; ++i) {
      if (own[i] < before) return messages::LimitOrder(op, sequence.query_begin + i, before, own[i]);
      before = own[i];
    }
    sequence.position = before - (sequence.query_length - 1);
  }
  return {};
}

}  // namespace

Status Begin(const PoolParts& pool, const char* op, const CacheRef& cache, const BatchRef& batch, std::int64_t layer,
             bool append, PinnedSlots* pinned, TableCall* by_block) {
  if (by_block != nullptr) KVPAGE_RETURN_IF_ERROR(pool.supply->OpenWindow());
  SlotTable& table = *pool.table;
  const Geometry& geometry = table.geometry();
  StateLock state = table.Lock();
  table.PassGate(&state);
  const ProgramCheck check(pool, state, op, cache);
  KVPAGE_RETURN_IF_ERROR(check.Begin(/*mutates=*/append));
  if (layer < 0 || layer >= geometry.num_layers) return messages::LayerRange(op, layer, geometry.num_layers);
  Pins pins;
  KVPAGE_RETURN_IF_ERROR(check.Batch(batch, &pins.sequences));
  if (batch.limits != nullptr) KVPAGE_RETURN_IF_ERROR(EndAtLimits(op, batch.limits, &pins.sequences));
  DeviceProgress& progress = table.progress(state);
  for (const Sequence& sequence : pins.sequences) {
    const std::int32_t slot = sequence.slot;
    const std::int64_t end = sequence.end();
    if (end > geometry.max_seq_len) return messages::MaxSeqLen(op, slot, end, geometry.max_seq_len);
    const std::int64_t room = table.Room(state, slot);
    if (end > room) return messages::Unmapped(op, slot, end, room);
    const std::int64_t shared = append ? progress.slots[slot].shared : 0;
    if (append && sequence.position < shared) return messages::Shared(op, slot, sequence.position, shared);
    const bool reads = !append || batch.attends;
    const std::int64_t first = reads ? sequence.FirstVisible(batch.window) : sequence.position;
    const std::int32_t dropped = progress.slots[slot].dropped;
    if (first < dropped) return messages::Dropped(op, slot, first, dropped);
    const std::int32_t written = progress.Written(slot)[layer];
    if (append && sequence.position > written) {
      // Otherwise the context before the new tokens would contain data of an earlier owner of the memory.
      return messages::LengthUnwritten(op, slot, layer, sequence.position, written);
    }
    if (append && pool.options.debug && sequence.position < written) {
      return messages::WrittenTwice(op, slot, layer, sequence.position);
    }
    if (!append && end > written) return messages::Unwritten(op, slot, layer, end, written);
  }
  if (by_block != nullptr) {
    by_block->sequences = pins.sequences;
    KVPAGE_RETURN_IF_ERROR(pool.supply->CopyTable(state, layer, by_block));
    pins.by_block = true;
  }
  if (append) {
    pins.written_layer = layer;
    pins.epoch = progress.NextEpoch();
  }
  pinned->Pin(state, &table, std::move(pins));
  return {};
}

Status Advance(const PoolParts& pool, const char* op, const CacheRef& cache, const BatchRef& batch,
               std::uint32_t* epoch, std::int32_t* lengths) {
  const StateLock state = pool.table->Lock();
  const ProgramCheck check(pool, state, op, cache);
  KVPAGE_RETURN_IF_ERROR(check.Begin(/*mutates=*/true));
  std::vector<Sequence> sequences;
  KVPAGE_RETURN_IF_ERROR(check.Batch(batch, &sequences));
  DeviceProgress& progress = pool.table->progress(state);
  for (const Sequence& sequence : sequences) {
    // Otherwise a reader would find data of an earlier owner of the memory.
    if (sequence.end() > progress.WrittenInAllLayers(sequence.slot)) {
      return messages::UnwrittenSomewhere(op, sequence.slot, sequence.end(), progress.Runs(sequence.slot));
    }
  }
  if (lengths != cache.lengths) std::copy_n(cache.lengths, pool.table->num_slots(), lengths);
  for (const Sequence& sequence : sequences) {
    const auto end = static_cast<std::int32_t>(sequence.end());
    lengths[sequence.slot] = progress.slots[sequence.slot].length = end;
  }
  *epoch = progress.NextEpoch();
  return {};
}

Status SetLengths(const PoolParts& pool, const char* op, const CacheRef& cache, const std::int32_t* slots,
                  const std::int32_t* values, std::int64_t count, std::uint32_t* epoch, std::int32_t* lengths) {
  const StateLock state = pool.table->Lock();
  const ProgramCheck check(pool, state, op, cache);
  KVPAGE_RETURN_IF_ERROR(check.Begin(/*mutates=*/true));
  DeviceProgress& progress = pool.table->progress(state);
  for (std::int64_t i = 0; i < count; ++i) {
    if (slots[i] == -1) continue;
    KVPAGE_RETURN_IF_ERROR(check.OccupiedSlot(slots[i]));
    const std::int32_t length = cache.lengths[slots[i]];
    if (values[i] < 0 || values[i] > length) return messages::NotLowered(op, slots[i], values[i], length);
    const std::int32_t shared = progress.slots[slots[i]].shared;
    if (values[i] < std::min(shared, length)) return messages::BelowShared(op, slots[i], values[i], shared);
    if (const std::int32_t dropped = progress.slots[slots[i]].dropped; values[i] < dropped) {
      return messages::BelowDropped(op, slots[i], values[i], dropped);
    }
    if (values[i] > progress.WrittenInAllLayers(slots[i])) {
      return messages::UnwrittenSomewhere(op, slots[i], values[i], progress.Runs(slots[i]));
    }
  }
  const std::uint32_t next = progress.NextEpoch();
  if (lengths != cache.lengths) std::copy_n(cache.lengths, pool.table->num_slots(), lengths);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t slot = slots[i];
    if (slot == -1) continue;
    if (values[i] < lengths[slot]) progress.slots[slot].since = next;
    progress.LowerWritten(slot, values[i]);
    lengths[slot] = progress.slots[slot].length = values[i];
  }
  *epoch = next;
  return {};
}

}  // namespace kvpage::program_ops
