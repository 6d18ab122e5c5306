// SlotTable: the valid slot table. Who occupies each slot, how many tokens have room, are written, are final.
//
// Two kinds of rows: HostSlot holds the host's decisions, once for a pool; DeviceProgress holds the work of programs,
// once for a device. Which memory is mapped is supply's business (supply.h).
//
// The table owns the state mutex. It is held for moments only, never over a system call, so that mapping memory does
// not delay programs that only read and write. A method that needs it takes a StateLock. Order of locks: mapping
// (MappingLock, supply.h), then state. Nothing here waits for Python.
//
// Rows change through methods here only. Each change notes its slot, and the next claim, which has the mapping mutex,
// brings its index of slots up to date with these (Supply::Refresh): handlers change rows without that mutex.
#ifndef KVPAGE_CACHE_SLOT_TABLE_H_
#define KVPAGE_CACHE_SLOT_TABLE_H_

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <limits>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cache/changed_slots.h"
#include "cache/device_progress.h"
#include "cache/geometry.h"
#include "cache/messages.h"
#include "cache/types.h"

namespace kvpage {

class SlotTable;

// The state mutex, held. Take it after a MappingLock, never before.
class StateLock {
 public:
  StateLock(const StateLock&) = delete;
  StateLock& operator=(const StateLock&) = delete;

 private:
  friend class SlotTable;
  explicit StateLock(std::mutex* mutex) : lock_(*mutex) {}
  std::unique_lock<std::mutex> lock_;
};

// The host's decisions about one slot.
struct HostSlot {
  SlotState state = SlotState::kFree;
  std::int32_t views = 0;               // zero-copy arrays alive over it
  std::int64_t reserved = 0;            // tokens asked for
  bool forked = false;                  // its occupant is a fork
  bool swapping = false;                // draining, and its sequence is swapped out: it has still to be taken
  std::int64_t restored = -1;           // tokens that its occupant was swapped in with; -1: it was not
  std::int64_t truncated = 0;           // the fewest tokens that a truncation leaves it whose program has not run
  std::int32_t truncations = 0;         // such programs
  std::int64_t dropped = 0;             // tokens at its beginning that the host has given up
  std::int64_t dropped_before = 0;      // the same before the last such call
  std::uint64_t released_at = 0;        // sequence number of the release, while draining
  std::uint64_t parked_at = 0;          // order of parking: the smallest was parked first
  std::vector<std::int32_t> committed;  // the ids of its tokens, as far as the host has named them
  std::vector<std::int32_t> cut;        // those behind `committed` that the last truncation has taken away
  // Of a sequence that the prefix index has, or will have: its namespace, the length of the prompt that it was acquired
  // with, the tokens that were found then, and the fewest committed ones since the index was last brought up to date.
  // A free slot keeps them, with `committed` cut back to what programs have written.
  std::int32_t space = -1;
  std::int64_t prompt = 0, found = 0, fewest = 0;
  // The index may have the tokens below this only: those behind depend on a segment that was computed elsewhere
  // (reuse.h). A free slot keeps none of these.
  std::int64_t exact = std::numeric_limits<std::int64_t>::max();

  bool idle() const { return state == SlotState::kFree && views == 0; }
};

class SlotTable {
 public:
  explicit SlotTable(const Geometry& geometry);

  const Geometry& geometry() const { return geometry_; }
  std::int64_t num_slots() const { return geometry_.max_slots; }
  // The pool's id, as messages name it. Set once, before other threads see the pool.
  std::int32_t id() const { return id_; }
  void set_id(std::int32_t id) { id_ = id; }

  StateLock Lock() const { return StateLock(&mutex_); }
  // Gives up the lock until `condition` holds: a handler has ended, a slot has drained or the pool was closed.
  template <class Condition>
  void Wait(StateLock* lock, Condition condition) const {
    changed_.wait(lock->lock_, condition);
  }
  // As Wait, for at most `seconds`; returns what `condition` says then.
  template <class Condition>
  bool WaitFor(StateLock* lock, double seconds, Condition condition) const {
    return changed_.wait_for(lock->lock_, std::chrono::duration<double>(seconds), condition);
  }

  // ---- rows ----
  const HostSlot& host(const StateLock&, std::int64_t slot) const { return slots_[slot]; }
  // The host names the next tokens of a slot.
  void Commit(const StateLock&, std::int32_t slot, const std::vector<std::int32_t>& token_ids);
  DeviceProgress& progress(const StateLock&) { return progress_; }
  // Tokens that may be written: `reserved` rounded up to whole blocks, which are mapped and stay mapped.
  std::int64_t Room(const StateLock&, std::int64_t slot) const {
    return std::min(geometry_.BlocksFor(slots_[slot].reserved) * geometry_.block_tokens, geometry_.max_seq_len);
  }
  const std::set<std::int32_t>& draining(const StateLock&) const { return draining_; }
  std::int64_t NumDraining(const StateLock&) const { return static_cast<std::int64_t>(draining_.size()); }

  // ---- checks ----
  bool closed(const StateLock&) const { return closed_; }
  Status CheckOpen(const StateLock&, const char* op) const { return closed_ ? messages::Closed(op, id_) : Status(); }
  // Nobody has the slot, or its release program has run: a cache that shows it as occupied is wrong.
  bool Vacant(const StateLock&, std::int64_t slot) const {
    return slots_[slot].state == SlotState::kFree || progress_.slots[slot].vacated;
  }
  Status CheckOccupied(const StateLock&, const char* op, std::int32_t slot) const;
  // Finds slots that one call names twice: StartNaming, then Name for each. False: it was named before.
  void StartNaming(const StateLock&) { ++stamp_; }
  bool Name(const StateLock&, std::int32_t slot) { return std::exchange(named_[slot], stamp_) != stamp_; }
  bool Named(const StateLock&, std::int32_t slot) const { return named_[slot] == stamp_; }

  // ---- changes ----
  void Occupy(const StateLock& lock, std::int32_t slot, std::int64_t tokens);
  // Raises what an occupant has asked for to at least `tokens`.
  void Reserve(const StateLock&, std::int32_t slot, std::int64_t tokens);
  // The host releases a slot, and takes that back.
  void StartDraining(const StateLock&, std::int32_t slot) { SetState(slot, SlotState::kDraining); }
  void CancelDraining(const StateLock&, std::int32_t slot) {
    slots_[slot].swapping = false;
    SetState(slot, SlotState::kOccupied);
  }
  // The same for a sequence that is swapped out: the slot does not come free before EndSwap.
  void StartSwap(const StateLock&, std::int32_t slot) {
    slots_[slot].swapping = true;
    SetState(slot, SlotState::kDraining);
  }
  void EndSwap(const StateLock&, std::int32_t slot) {
    slots_[slot].swapping = false;
    FinishDraining(slot);
  }
  // Blocks of a swapped sequence are being written, and will come free. Waiters for slots that drain wait for these.
  void StartSwapWrite(const StateLock&) { ++swap_writes_; }
  void EndSwapWrite(const StateLock&) {
    --swap_writes_;
    changed_.notify_all();
  }
  std::int64_t swap_writes(const StateLock&) const { return swap_writes_; }
  // Tokens, in whole blocks, that a fork with `tokens` of the donor's may map. Blocks that a queued truncation may
  // replace are not among them.
  std::int64_t Lendable(const StateLock&, std::int32_t donor, std::int64_t tokens) const;
  // Occupies a slot with the first `tokens` committed tokens of its donor. Call Reserve once they are mapped.
  void OccupyFork(const StateLock& lock, std::int32_t slot, std::int32_t donor, std::int64_t tokens);
  // Occupies a slot that begins with `found` tokens, whose keys and values are there. Call Reserve once they are
  // mapped.
  void OccupyFound(const StateLock& lock, std::int32_t slot, std::int32_t space, const std::int32_t* ids,
                   std::int64_t found);
  // Occupies a slot with a sequence that was swapped out, whose memory it has soon: positions below `shared` are not
  // its to write. Call Reserve once they are mapped.
  void OccupySwapped(const StateLock& lock, std::int32_t slot, const std::vector<std::int32_t>& ids, std::int32_t space,
                     std::int64_t prompt, std::int64_t shared);
  void SetPrompt(const StateLock&, std::int32_t slot, std::int64_t tokens) { slots_[slot].prompt = tokens; }
  // The program that occupies such a slot was not queued: the slot is free, with what was found; and, if it had a
  // sequence, with what that has in the last block, or the `whole` of it.
  void UndoFound(const StateLock&, std::int32_t slot, bool whole = false);
  // The slot is free and has lost its blocks: nothing is left of its sequence.
  void ForgetSequence(const StateLock&, std::int32_t slot);
  // A free slot keeps the first `tokens` tokens of its sequence only.
  void KeepTokens(const StateLock&, std::int32_t slot, std::int64_t tokens) {
    std::vector<std::int32_t>& ids = slots_[slot].committed;
    ids.resize(std::min<std::size_t>(ids.size(), tokens));
  }
  // The prefix index must be told of the slot again.
  void NoteCommit(const StateLock&, std::int32_t slot) {
    if (slots_[slot].space >= 0) commits_.Note(slot);
  }
  // The prefix index is brought up to date with what is committed now.
  void NoteStored(const StateLock&, std::int32_t slot) {
    slots_[slot].fewest = static_cast<std::int64_t>(slots_[slot].committed.size());
  }
  // A truncation's program is queued; it has run.
  void StartTruncation(const StateLock&, std::int32_t slot, std::int64_t tokens);
  void EndTruncation(const StateLock&, std::int32_t slot);
  // The host gives up the tokens below `tokens`, and takes that back.
  void StartDrop(const StateLock&, std::int32_t slot, std::int64_t tokens);
  void UndoDrop(const StateLock&, std::int32_t slot);
  // See HostSlot::exact.
  void SetExact(const StateLock&, std::int32_t slot, std::int64_t tokens) { slots_[slot].exact = tokens; }
  // A generation starts: programs that are queued will not run. A fork among them leaves its slot to nobody.
  void StartGeneration(const StateLock& lock, std::int32_t slot);
  void CutCommitted(const StateLock&, std::int32_t slot, std::int64_t tokens);
  void RestoreCommitted(const StateLock&, std::int32_t slot);
  // Takes back room and committed tokens beyond these.
  void Retract(const StateLock& lock, std::int32_t slot, std::int64_t reserved, std::int64_t committed);
  // A draining slot's release program has run. `written`: the tokens that programs had written in every layer by then,
  // where a mirror knows them.
  void Vacate(const StateLock& lock, std::int32_t slot, std::int64_t written = -1);
  // What to call, with the state mutex held, when a sequence that the prefix index has is parked.
  void OnParked(const StateLock&, std::function<void()> call) { on_parked_ = std::move(call); }
  void AddView(const StateLock& lock, std::int32_t slot);  // -1: over all slots
  void RemoveView(const StateLock& lock, std::int32_t slot);
  bool viewed(const StateLock&, std::int64_t slot) const { return views_of_all_ > 0 || slots_[slot].views > 0; }
  void Pin(const StateLock&, const Pins& pins) {
    for (const Sequence& sequence : pins.sequences) {
      SlotProgress& slot = progress_.slots[sequence.slot];
      ++slot.pins;
      slot.by_block += pins.by_block;
    }
    ++progress_.running;
  }
  void Unpin(const StateLock& lock, const Pins& pins);
  void Close(const StateLock&);
  // The slots whose sequences the prefix index must be told of: tokens were committed or cut, or the slot has come
  // free. Once each, in no order.
  std::vector<std::int32_t> TakeCommits(const StateLock&) { return commits_.Take(); }
  // The slots whose row has changed since the last call, once each, in no order.
  std::vector<std::int32_t> TakeChanged(const StateLock&) { return changes_.Take(); }

  // ---- the gate, which keeps handlers from starting while a host call waits for them (patience.h) ----
  // Handlers pass it before they pin slots; no MappingLock may be held.
  void PassGate(StateLock* lock) const {
    if (gates_ > 0) Wait(lock, [this] { return gates_ == 0 || closed_; });
  }
  bool gated(const StateLock&) const { return gates_ > 0 && !closed_; }
  void CloseGate(const StateLock&) { ++gates_; }
  void OpenGate(const StateLock&) {
    if (--gates_ == 0) changed_.notify_all();
  }

  // How often a call waited for programs.
  void CountWait(const StateLock&) { ++waits_; }
  std::int64_t waits(const StateLock&) const { return waits_; }

 private:
  void SetState(std::int32_t slot, SlotState state);
  void FinishDraining(std::int32_t slot);

  const Geometry geometry_;
  std::int32_t id_ = -1;

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::vector<HostSlot> slots_;
  std::set<std::int32_t> draining_;
  ChangedSlots changes_, commits_;
  std::function<void()> on_parked_;
  DeviceProgress progress_;
  std::vector<std::uint64_t> named_;  // [slots] stamp of the last call that named it
  std::uint64_t stamp_ = 0;
  std::uint64_t releases_ = 0, parkings_ = 0;
  std::int32_t views_of_all_ = 0;
  std::int32_t gates_ = 0;  // calls that keep the gate closed
  std::int64_t waits_ = 0;
  std::int64_t swap_writes_ = 0;
  bool closed_ = false;
};

// A running handler: while it lives its slots are pinned, so neither their memory nor their owner changes.
class PinnedSlots {
 public:
  PinnedSlots() = default;
  ~PinnedSlots() {
    if (table_ != nullptr) table_->Unpin(table_->Lock(), pins_);
  }
  PinnedSlots(const PinnedSlots&) = delete;
  PinnedSlots& operator=(const PinnedSlots&) = delete;

  void Pin(const StateLock& lock, SlotTable* table, Pins pins) {
    pins_ = std::move(pins);
    table_ = table;
    table_->Pin(lock, pins_);
  }
  const std::vector<Sequence>& sequences() const { return pins_.sequences; }
  std::uint32_t epoch() const { return pins_.epoch; }

 private:
  SlotTable* table_ = nullptr;
  Pins pins_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_SLOT_TABLE_H_
