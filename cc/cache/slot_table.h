// SlotTable: the valid slot table: the occupant of each slot, and how many of its tokens have room, are written, and
// are final.
//
// There are two kinds of rows: HostSlot holds the decisions of the host, once per pool; DeviceProgress holds the work
// of programs, once per device. supply.h decides which memory is mapped.
//
// The table owns the state mutex. It is held only briefly, never during a system call, so that mapping memory does not
// delay programs that only read and write. Methods that need it take a StateLock. Lock order: mapping (MappingLock,
// supply.h), then state. Nothing here waits for Python.
//
// Rows change only through the methods here. Each change records its slot, and the next claim, which holds the mapping
// mutex, updates its index of slots (Supply::Refresh): handlers change rows without that mutex.
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

// Holds the state mutex. Take it after a MappingLock, never before.
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
  std::int32_t views = 0;               // live zero-copy arrays over it
  std::int64_t reserved = 0;            // tokens requested
  bool forked = false;                  // its occupant is a fork
  bool swapping = false;                // draining, and its sequence is being swapped out but has not been taken yet
  std::int64_t restored = -1;           // number of tokens that its occupant was swapped in with; -1 if it was not
  std::int64_t truncated = 0;           // the fewest tokens left by a truncation whose program has not run
  std::int32_t truncations = 0;         // number of such truncations
  std::int64_t dropped = 0;             // leading tokens that the host has given up
  std::int64_t dropped_before = 0;      // value of `dropped` before the latest such call
  std::uint64_t released_at = 0;        // sequence number of the release, while draining
  std::uint64_t parked_at = 0;          // order of parking: the smallest was parked first
  std::vector<std::int32_t> committed;  // ids of its committed tokens
  std::vector<std::int32_t> cut;        // tokens after `committed` that the last truncation removed
  // For a sequence that is or will be in the prefix index: its namespace, the length of the prompt with which it was
  // acquired, the number of tokens found then, and the fewest committed tokens since the index was last updated. A free
  // slot keeps them, with `committed` cut to what programs have written.
  std::int32_t space = -1;
  std::int64_t prompt = 0, found = 0, fewest = 0;
  // The index may only store tokens below this: later ones depend on a segment that was computed elsewhere (reuse.h). A
  // free slot keeps none of those.
  std::int64_t exact = std::numeric_limits<std::int64_t>::max();

  bool idle() const { return state == SlotState::kFree && views == 0; }
};

class SlotTable {
 public:
  explicit SlotTable(const Geometry& geometry);

  const Geometry& geometry() const { return geometry_; }
  std::int64_t num_slots() const { return geometry_.max_slots; }
  // The pool's id, for messages. Set once, before other threads see the pool.
  std::int32_t id() const { return id_; }
  void set_id(std::int32_t id) { id_ = id; }

  StateLock Lock() const { return StateLock(&mutex_); }
  // Releases the lock until `condition` holds: a handler has ended, a slot has drained or the pool was closed.
  template <class Condition>
  void Wait(StateLock* lock, Condition condition) const {
    changed_.wait(lock->lock_, condition);
  }
  // Like Wait, for at most `seconds`; returns the final value of `condition`.
  template <class Condition>
  bool WaitFor(StateLock* lock, double seconds, Condition condition) const {
    return changed_.wait_for(lock->lock_, std::chrono::duration<double>(seconds), condition);
  }

  // ---- rows ----
  const HostSlot& host(const StateLock&, std::int64_t slot) const { return slots_[slot]; }
  // Appends the ids of the next tokens of a slot.
  void Commit(const StateLock&, std::int32_t slot, const std::vector<std::int32_t>& token_ids);
  DeviceProgress& progress(const StateLock&) { return progress_; }
  // Number of tokens that may be written: `reserved` rounded up to full blocks, which are mapped and stay mapped.
  std::int64_t Room(const StateLock&, std::int64_t slot) const {
    return std::min(geometry_.BlocksFor(slots_[slot].reserved) * geometry_.block_tokens, geometry_.max_seq_len);
  }
  const std::set<std::int32_t>& draining(const StateLock&) const { return draining_; }
  std::int64_t NumDraining(const StateLock&) const { return static_cast<std::int64_t>(draining_.size()); }

  // ---- checks ----
  bool closed(const StateLock&) const { return closed_; }
  Status CheckOpen(const StateLock&, const char* op) const { return closed_ ? messages::Closed(op, id_) : Status(); }
  // Whether the slot is free or its release program has run: a cache that shows it as occupied is wrong.
  bool Vacant(const StateLock&, std::int64_t slot) const {
    return slots_[slot].state == SlotState::kFree || progress_.slots[slot].vacated;
  }
  Status CheckOccupied(const StateLock&, const char* op, std::int32_t slot) const;
  // Detects slots that a call names twice: StartNaming, then Name for each, which returns false if it was named before.
  void StartNaming(const StateLock&) { ++stamp_; }
  bool Name(const StateLock&, std::int32_t slot) { return std::exchange(named_[slot], stamp_) != stamp_; }
  bool Named(const StateLock&, std::int32_t slot) const { return named_[slot] == stamp_; }

  // ---- changes ----
  void Occupy(const StateLock& lock, std::int32_t slot, std::int64_t tokens);
  // Raises the tokens requested by an occupant to at least `tokens`.
  void Reserve(const StateLock&, std::int32_t slot, std::int64_t tokens);
  // The host releases a slot, or undoes that.
  void StartDraining(const StateLock&, std::int32_t slot) { SetState(slot, SlotState::kDraining); }
  void CancelDraining(const StateLock&, std::int32_t slot) {
    slots_[slot].swapping = false;
    SetState(slot, SlotState::kOccupied);
  }
  // The same for a sequence that is swapped out: the slot does not become free before EndSwap.
  void StartSwap(const StateLock&, std::int32_t slot) {
    slots_[slot].swapping = true;
    SetState(slot, SlotState::kDraining);
  }
  void EndSwap(const StateLock&, std::int32_t slot) {
    slots_[slot].swapping = false;
    FinishDraining(slot);
  }
  // Blocks of a swapped sequence are being written and will become free. Waiters for draining slots also wait for this.
  void StartSwapWrite(const StateLock&) { ++swap_writes_; }
  void EndSwapWrite(const StateLock&) {
    --swap_writes_;
    changed_.notify_all();
  }
  std::int64_t swap_writes(const StateLock&) const { return swap_writes_; }
  // Number of tokens, in full blocks, that a fork with `tokens` of the donor's tokens may map. Excludes blocks that a
  // queued truncation may replace.
  std::int64_t Lendable(const StateLock&, std::int32_t donor, std::int64_t tokens) const;
  // Occupies a slot with the first `tokens` committed tokens of its donor. Call Reserve once they are mapped.
  void OccupyFork(const StateLock& lock, std::int32_t slot, std::int32_t donor, std::int64_t tokens);
  // Occupies a slot that begins with `found` tokens, whose keys and values are in memory. Call Reserve once they are
  // mapped.
  void OccupyFound(const StateLock& lock, std::int32_t slot, std::int32_t space, const std::int32_t* ids,
                   std::int64_t found);
  // Occupies a slot with a sequence that was swapped out and whose memory will be mapped. The slot must not write
  // positions below `shared`. Call Reserve once they are mapped.
  void OccupySwapped(const StateLock& lock, std::int32_t slot, const std::vector<std::int32_t>& ids, std::int32_t space,
                     std::int64_t prompt, std::int64_t shared);
  void SetPrompt(const StateLock&, std::int32_t slot, std::int64_t tokens) { slots_[slot].prompt = tokens; }
  // Called if the program that occupies such a slot was not queued. The slot becomes free and keeps the tokens found.
  // If it had a sequence before, it also keeps the rest of that sequence in the last block, or all of it with `whole`.
  void UndoFound(const StateLock&, std::int32_t slot, bool whole = false);
  // The slot is free and has lost its blocks: forgets its sequence.
  void ForgetSequence(const StateLock&, std::int32_t slot);
  // Cuts the sequence of a free slot to its first `tokens` tokens.
  void KeepTokens(const StateLock&, std::int32_t slot, std::int64_t tokens) {
    std::vector<std::int32_t>& ids = slots_[slot].committed;
    ids.resize(std::min<std::size_t>(ids.size(), tokens));
  }
  // Notes that the prefix index must be updated for the slot.
  void NoteCommit(const StateLock&, std::int32_t slot) {
    if (slots_[slot].space >= 0) commits_.Note(slot);
  }
  // Called when the prefix index is updated with what is committed now.
  void NoteStored(const StateLock&, std::int32_t slot) {
    slots_[slot].fewest = static_cast<std::int64_t>(slots_[slot].committed.size());
  }
  // A truncation's program was queued, or has run.
  void StartTruncation(const StateLock&, std::int32_t slot, std::int64_t tokens);
  void EndTruncation(const StateLock&, std::int32_t slot);
  // The host gives up the tokens below `tokens`, or undoes that.
  void StartDrop(const StateLock&, std::int32_t slot, std::int64_t tokens);
  void UndoDrop(const StateLock&, std::int32_t slot);
  // A program has dropped these tokens. The call that queued it may have been interrupted afterwards, and undone.
  void NoteDropped(const StateLock&, std::int32_t slot, std::int32_t tokens);
  // See HostSlot::exact.
  void SetExact(const StateLock&, std::int32_t slot, std::int64_t tokens) { slots_[slot].exact = tokens; }
  // A generation starts: queued programs will not run. A slot that was to be occupied by a queued fork becomes free.
  void StartGeneration(const StateLock& lock, std::int32_t slot);
  void CutCommitted(const StateLock&, std::int32_t slot, std::int64_t tokens);
  void RestoreCommitted(const StateLock&, std::int32_t slot);
  // Limits room and committed tokens to these numbers.
  void Retract(const StateLock& lock, std::int32_t slot, std::int64_t reserved, std::int64_t committed);
  // A draining slot's release program has run. `written`: the number of tokens that programs had written in every layer
  // by then, if a mirror knows it.
  void Vacate(const StateLock& lock, std::int32_t slot, std::int64_t written = -1);
  // Sets a function that is called, with the state mutex held, when a sequence in the prefix index is parked.
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
  // The slots for which the prefix index must be updated: tokens were committed or cut, or the slot became free. Each
  // once, in no particular order.
  std::vector<std::int32_t> TakeCommits(const StateLock&) { return commits_.Take(); }
  // The slots whose row has changed since the last call, each once, in no particular order.
  std::vector<std::int32_t> TakeChanged(const StateLock&) { return changes_.Take(); }

  // ---- the gate, which keeps handlers from starting while a host call waits for them (patience.h) ----
  // Handlers pass the gate before they pin slots; they must not hold a MappingLock.
  void PassGate(StateLock* lock) const {
    if (gates_ > 0) Wait(lock, [this] { return gates_ == 0 || closed_; });
  }
  bool gated(const StateLock&) const { return gates_ > 0 && !closed_; }
  void CloseGate(const StateLock&) { ++gates_; }
  void OpenGate(const StateLock&) {
    if (--gates_ == 0) changed_.notify_all();
  }

  // Counts a call that waited for programs.
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
  std::vector<std::uint64_t> named_;  // [slots] stamp of the latest call that named it
  std::uint64_t stamp_ = 0;
  std::uint64_t releases_ = 0, parkings_ = 0;
  std::int32_t views_of_all_ = 0;
  std::int32_t gates_ = 0;  // number of calls that keep the gate closed
  std::int64_t waits_ = 0;
  std::int64_t swap_writes_ = 0;
  bool closed_ = false;
};

// Represents a running handler: while it exists, its slots are pinned, so neither their memory nor their owners change.
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
