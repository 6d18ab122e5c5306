// ProgramCheck: compares the cache value that a program carries with the table, at the start of every op.
//
// A program is checked against its cache value (generation, epoch, lengths) and not against the host's rows, which may
// be ahead of it. kernels/cuda/checker.cuh makes the same checks on a device.
#ifndef KVPAGE_CACHE_PROGRAM_CHECK_H_
#define KVPAGE_CACHE_PROGRAM_CHECK_H_

#include <cstdint>
#include <vector>

#include "base/epoch.h"
#include "cache/messages.h"
#include "cache/parts.h"

namespace kvpage {

// `op` begins every message. Call Begin first, then check the slots of the call.
class ProgramCheck {
 public:
  ProgramCheck(const PoolParts& pool, const StateLock& state, const char* op, const CacheRef& cache)
      : pool_(pool), state_(state), op_(op), cache_(cache) {}

  // Checks that the pool is open, that no op has failed on a mesh, and that generation and epoch allow the op.
  Status Begin(bool mutates) const {
    SlotTable& table = *pool_.table;
    const DeviceProgress& progress = table.progress(state_);
    const bool stale = mutates && !pool_.options.allow_stale && cache_.epoch != progress.epoch;
    const bool other = cache_.generation != progress.generation;
    const bool refused = other || stale || Before(progress.epoch, cache_.epoch);
    if (refused || table.closed(state_) || !progress.fault.ok()) return Refusal();
    table.StartNaming(state_);
    return {};
  }
  // Checks that the slot exists, was not named before in this call, and had no destructive change since the cache's
  // epoch.
  Status Slot(std::int32_t slot) const {
    SlotTable& table = *pool_.table;
    if (slot < 0 || slot >= table.num_slots()) return messages::SlotRange(op_, slot, table.num_slots());
    if (!table.Name(state_, slot)) return messages::SlotTwice(op_, slot);
    return Fresh(slot);
  }
  // Like Slot; also checks that the slot is occupied in the cache value.
  Status OccupiedSlot(std::int32_t slot) const {
    KVPAGE_RETURN_IF_ERROR(Slot(slot));
    return cache_.lengths[slot] < 0 ? messages::SlotFree(op_, slot) : Status();
  }
  // The last check of Slot, for a slot that exists.
  Status Fresh(std::int32_t slot) const {
    const std::uint32_t since = pool_.table->progress(state_).slots[slot].since;
    return Before(cache_.epoch, since) ? messages::StaleSlot(op_, slot, cache_.epoch, since) : Status();
  }
  // Checks every slot of a batch; appends the sequences with new tokens to `sequences`.
  Status Batch(const BatchRef& batch, std::vector<Sequence>* sequences) const;

 private:
  // The reason why Begin fails.
  Status Refusal() const;

  const PoolParts& pool_;
  const StateLock& state_;
  const char* const op_;
  const CacheRef& cache_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PROGRAM_CHECK_H_
