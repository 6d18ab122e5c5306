// Supply: where blocks come from: free blocks first, then those of parked slots, and those that occupied slots have
// beyond what they requested.
//
// It owns the arena and the mapping mutex, which is held during system calls. Methods that need it take a MappingLock.
// Lock order: mapping, then state (StateLock, slot_table.h); the methods here take the state mutex themselves, for
// short times.
//
// Planning and applying are separate calls with a SupplyPlan in between. Candidates (candidates.h) keeps the slots from
// which plans choose in order. A donor gives only blocks without other references: a shared block could not be moved,
// and unmapping it in one slot would not free it.
#ifndef KVPAGE_CACHE_SUPPLY_H_
#define KVPAGE_CACHE_SUPPLY_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "base/status.h"
#include "cache/arena.h"
#include "cache/candidates.h"
#include "cache/prefix_index.h"
#include "cache/slot_table.h"
#include "cache/supply_plan.h"
#include "cache/swap_table.h"
#include "cache/types.h"
#include "vmm/mappings.h"

namespace kvpage {

// Holds the mapping mutex. Never take it while holding a StateLock.
class MappingLock {
 public:
  MappingLock(const MappingLock&) = delete;
  MappingLock& operator=(const MappingLock&) = delete;

 private:
  friend class Supply;
  explicit MappingLock(std::mutex* mutex) : lock_(*mutex) {}
  const std::lock_guard<std::mutex> lock_;
};

class Supply {
 public:
  // `account`: where the pool's memory mappings are accounted; may be null. `poison`: see PoolOptions.
  Supply(SlotTable* table, std::unique_ptr<Arena> arena, MapAccount* account, bool poison)
      : table_(table), mappings_(account), arena_(std::move(arena)), candidates_(table->num_slots()), poison_(poison) {}

  MappingLock Lock() const { return MappingLock(&mutex_); }
  Arena& arena(const MappingLock&) { return *arena_; }
  char* base() const { return arena_->base(); }
  const SharedRuns& shared_runs() const { return arena_->shared_runs(); }

  // ---- blocks by number (supply_tables.cc), for handlers ----
  // Makes the block window available. The first call takes the mapping mutex.
  Status OpenWindow();
  // Copies the rows of the block table that `call->sequences` need in one layer. The caller must pin their slots under
  // the same lock, with Pins::by_block.
  Status CopyTable(const StateLock& state, std::int64_t layer, TableCall* call) const;
  // Drops references that slots hold for handlers that have ended since.
  void ReleaseHeld(const MappingLock& lock);

  // ---- dropped beginnings (supply_drop.cc) ----
  // Notes that the slot no longer needs what is below its `dropped`, once the handlers that are running now have ended.
  void NoteDrop(const MappingLock&, std::int32_t slot) { drops_.push_back(slot); }
  // Unmaps blocks of these slots that no handler uses any more.
  void FinishDrops(const MappingLock& lock);
  // Completes changes that were waiting for handlers that have ended since.
  void FinishChanges(const MappingLock& lock) {
    ReleaseHeld(lock);
    FinishDrops(lock);
    FinishSwaps(lock);
  }

  // ---- swapped sequences (supply_swap.cc) ----
  SwapTable& swaps(const MappingLock&) { return swaps_; }
  // Notes that the slot's sequence was taken: the slot is emptied and becomes free once no handler and no view uses it.
  void NoteSwap(const MappingLock&, std::int32_t slot) { emptying_.push_back(slot); }
  void FinishSwaps(const MappingLock& lock);
  // Claims blocks with one reference each that no slot maps. If there are not enough free blocks, takes them from
  // donors and the prefix index.
  Claim ClaimBlocks(const MappingLock& lock, std::int64_t count, std::vector<std::int32_t>* blocks);
  // The same for blocks whose memory will be in another file: see Arena::ClaimNumbers.
  Claim ClaimNumbers(const MappingLock& lock, std::int64_t count, std::vector<std::int32_t>* blocks);
  HandoverCounts& handovers(const MappingLock&) { return handovers_; }

  // Reserves in the account the mappings that a budget of `blocks` may need. Lowering the budget always succeeds.
  Status PromiseMappings(const MappingLock&, std::int64_t blocks);

  // See Candidates::BestFits. The slots stay idle while the lock is held.
  std::vector<std::int32_t> BestFits(const MappingLock& lock, const std::vector<std::int64_t>& blocks);

  // ---- sharing (supply_sharing.cc) ----
  // Free slots with the fewest blocks; fewer than `count` when there are no more.
  std::vector<std::int32_t> FewestBlocks(const MappingLock& lock, std::size_t count);
  // See Arena::Alias, SetAside and Separate. These reserve memory mappings of the process first, and take blocks from
  // donors. If Alias fails, some slots may have got blocks: empty them.
  struct AliasRun {
    std::int32_t slot = 0;
    const std::int32_t* map = nullptr;  // [blocks, ranges]
    std::int64_t blocks = 0;
  };
  Status Alias(const MappingLock& lock, const std::vector<AliasRun>& runs);
  struct SetAsideBlocks {
    std::int32_t slot = 0;
    std::vector<std::int64_t> logical;
  };
  Claim SetAside(const MappingLock& lock, const std::vector<SetAsideBlocks>& wanted);
  Status Separate(const MappingLock& lock, std::int32_t slot, std::int64_t begin);
  // Frees blocks that are set aside for truncations whose programs will not run.
  void DropStaleSetAside(const MappingLock& lock);
  // Whether a free slot must give up all its blocks before it gets a new owner: if any of them is or was shared with
  // other slots or is referenced by the prefix index, because the new owner must not write those; if the slot has
  // dropped its beginning; or if it keeps its blocks in a separate file.
  bool GivesUp(const MappingLock&, std::int32_t slot) const {
    return arena_->SharedBlocks(slot) > 0 || arena_->Borrows(slot) || arena_->HasCached(slot) ||
           arena_->hole(slot) > 0 || arena_->HasFile(slot);
  }
  Status DropShared(const MappingLock& lock, std::int32_t slot);
  // Makes free slots give up blocks that they share with live ones, so that a truncation need not copy these.
  Status DropFreeShared(const MappingLock& lock);
  // The same, also for blocks in the prefix index: a view of all slots must not show them.
  Status DropFreeCached(const MappingLock& lock);

  // ---- the prefix index (supply_prefix.cc) ----
  // Created at the first call. It contains sequences that were acquired by their tokens, and their forks.
  PrefixIndex& OpenIndex(const MappingLock& lock);
  const PrefixIndex* index(const MappingLock&) const { return index_.get(); }
  // Number of tokens that requests asked for by id, number of these that were found, and number of those that had been
  // read from a store.
  struct PrefixCounts {
    std::int64_t queries = 0, hits = 0, fetched = 0;
  };
  PrefixCounts& counts(const MappingLock&) { return counts_; }
  // Sets a function that is called, with the mapping mutex held, when entries were evicted and when a claim leaves less
  // than this share of the blocks free.
  void OnPressure(const MappingLock&, double free_share, std::function<void()> call) {
    free_share_ = free_share;
    on_pressure_ = std::move(call);
  }
  // Updates the index with what slots hold now. Must be called before every lookup.
  void SyncIndex(const MappingLock& lock);
  // Called before a slot writes again from `tokens` on: removes what the index has of the slot from there on.
  void CutIndex(const MappingLock& lock, std::int32_t slot, std::int64_t tokens);
  // Makes an idle slot give up all its blocks. The index keeps those to which it refers.
  Status Empty(const MappingLock& lock, std::int32_t slot);
  // Whether the process has enough memory mappings left for an Alias that needs this many.
  bool CanAlias(const MappingLock& lock, std::int64_t mappings);
  // Makes the index drop entries until at least `blocks` physical blocks become free. Returns the number freed. If
  // there are not enough, drops all that it can with `partial`, and otherwise nothing.
  std::int64_t Evict(const MappingLock& lock, std::int64_t blocks, bool partial = false);
  // The same in two steps, so that several pools can drop the same entries. `allowed`: the first blocks of the entries
  // that may be dropped; null: any.
  struct EvictionPlan {
    std::vector<PrefixIndex::Eviction> entries;
    std::vector<std::int32_t> owners;  // parked slots that map them
    std::int64_t freed = 0;            // physical blocks
  };
  EvictionPlan PlanEvictionOf(const MappingLock& lock, std::int64_t blocks,
                              const std::unordered_set<std::int32_t>* allowed = nullptr);
  void ApplyEviction(const MappingLock& lock, const EvictionPlan& plan);
  // The first block of each entry.
  std::vector<std::int32_t> BlocksOf(const MappingLock& lock, const EvictionPlan& plan) const;
  // The clock for pins, in seconds.
  static double Now();

  // ---- relocation (supply_relocate.cc) ----
  // Moves the contents of block `from`, which a slot (-1: no slot) maps at this place, to the free block `to`. If this
  // no longer applies, or a program could write the block, does nothing and sets `moved` to false.
  Status MoveBlock(const MappingLock& lock, std::int32_t slot, const Arena::Place& at, std::int32_t from,
                   std::int32_t to, bool* moved);

  // ---- one decision for several pools (supply_joint.cc) ----
  // All slots that can give blocks while `want` is to be met, in the order in which they give.
  std::vector<Donor> AllDonors(const MappingLock& lock, const Want& want);

  // ---- plans ----
  // Plans how to meet the wants, which must name different slots. If there are not enough blocks, the claim says so and
  // the plan is invalid. `evict`: the prefix index may drop entries now if needed; without it, the claim only says
  // whether that would suffice.
  Claim Plan(const MappingLock& lock, const std::vector<Want>& wants, Source first, SupplyPlan* plan,
             bool evict = false);
  // Plans to free at least `blocks` physical blocks, taking only unneeded ones to which the prefix index does not
  // refer.
  SupplyPlan PlanReclaim(const MappingLock& lock, std::int64_t blocks);
  // Frees at least `blocks` physical blocks, if as many are not needed; those in the prefix index come last.
  Status Reclaim(const MappingLock& lock, std::int64_t blocks);
  // Plans to unmap everything that is not needed and not in the prefix index.
  SupplyPlan PlanTrim(const MappingLock& lock);

  // ---- applying ----
  // Applies a plan that was made under the same lock. If it fails, undoes what was done. `system_short`: whether it
  // failed because the system had no memory for free blocks.
  Status Apply(const MappingLock& lock, const SupplyPlan& plan, bool* system_short = nullptr);
  // Undoes an applied plan: moved blocks return to their donors, and claimed ones become free.
  void Undo(const MappingLock& lock, const SupplyPlan& plan);
  // Plans and applies; plans again if the system has less memory than the capacity promises.
  Claim Reserve(const MappingLock& lock, const std::vector<Want>& wants, SupplyPlan* plan);

  // Whether Blank overwrites the slot's blocks.
  bool Blanks(const MappingLock&, std::int32_t slot) const { return poison_ || table_->viewed(table_->Lock(), slot); }
  // Sets the numbers of a failed claim.
  void Tally(const MappingLock& lock, const std::vector<Want>& wants, Claim* claim);
  // Overwrites logical blocks [begin, end) before a new owner sees them: with zeros if there is a view, with NaN as
  // poison.
  Status Blank(const MappingLock& lock, std::int32_t slot, std::int64_t begin, std::int64_t end);

 private:
  // Which spare blocks of a slot count: all, or only those at its end without other references.
  enum class Spare { kAll, kExclusive };
  // Updates the candidates with the slots that have changed.
  void Refresh(const MappingLock& lock);
  // Makes slots among the changed ones that have no owner give up what they have from others.
  void EmptyBorrowers(const MappingLock& lock, const std::vector<std::int32_t>& changed);
  // Makes `count` blocks free.
  Claim FreeBlocks(const MappingLock& lock, std::int64_t count);
  // Reserves `more` mappings in addition to those of blocks that are mapped once.
  Status PromiseAliases(const MappingLock& lock, std::int64_t more);
  // See PrefixIndex::Cut.
  void Cut(const MappingLock& lock, std::int32_t slot, std::int64_t tokens, std::int64_t keep);
  // Entries that free at least `enough` blocks when dropped, or all that can be dropped; `owners`: parked slots that
  // map them. `allowed`: see PlanEvictionOf.
  std::vector<PrefixIndex::Eviction> PlanEviction(const MappingLock& lock, std::int64_t enough, std::int64_t* freed,
                                                  std::vector<std::int32_t>* owners,
                                                  const std::unordered_set<std::int32_t>* allowed = nullptr) const;
  // Logical blocks that slots could give while `wants` are to be met, if no block were shared.
  std::int64_t SpareBlocks(const std::vector<Want>& wants) const;
  // The slots with spare blocks while `wants` are to be met, in the order in which they give blocks: the first ones
  // that have at least `enough` logical blocks together, or all.
  std::vector<Donor> FindDonors(const std::vector<Want>& wants, Spare spare, std::int64_t enough) const;
  void UndoPart(const MappingLock& lock, const SupplyPlan& plan, std::size_t returns, std::size_t moves);

  SlotTable* const table_;
  MapPromise mappings_;              // destroyed after the memory
  std::int64_t worst_mappings_ = 0;  // for the budget's blocks, each mapped once
  const std::unique_ptr<Arena> arena_;
  Candidates candidates_;
  std::vector<std::int32_t> drops_;  // slots that may have something left to unmap
  SwapTable swaps_;
  std::vector<std::int32_t> emptying_;  // slots whose sequences were swapped out
  std::unique_ptr<PrefixIndex> index_;
  PrefixCounts counts_;
  HandoverCounts handovers_;
  double free_share_ = 0;
  std::function<void()> on_pressure_;
  const bool poison_;
  mutable std::mutex mutex_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_SUPPLY_H_
