// Supply: where blocks come from. Free ones first, then those of parked slots and the tails that occupied slots have
// beyond what they asked for.
//
// It owns the arena and the mapping mutex, which is held over system calls. A method that needs it takes a MappingLock.
// Order of locks: mapping, then state (StateLock, slot_table.h); the methods here take the state mutex themselves, for
// moments.
//
// Planning and applying are separate calls with a SupplyPlan in between. Candidates (candidates.h) keeps the slots that
// plans choose from in order. A donor gives only blocks without other
// references: a shared block could not be moved, and unmapping it in one slot would not free it.
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

// The mapping mutex, held. Never take it while a StateLock is held.
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
  // `account`: whose mappings the pool uses; null: none. `poison`: see PoolOptions.
  Supply(SlotTable* table, std::unique_ptr<Arena> arena, MapAccount* account, bool poison)
      : table_(table), mappings_(account), arena_(std::move(arena)), candidates_(table->num_slots()), poison_(poison) {}

  MappingLock Lock() const { return MappingLock(&mutex_); }
  Arena& arena(const MappingLock&) { return *arena_; }
  char* base() const { return arena_->base(); }
  const SharedRuns& shared_runs() const { return arena_->shared_runs(); }

  // ---- blocks by number (supply_tables.cc), for handlers ----
  // Makes the block window ready. Takes the mapping mutex at the first call.
  Status OpenWindow();
  // Copies the rows of the block table that `call->sequences` need in one layer. The caller pins their slots under the
  // same lock, with Pins::by_block.
  Status CopyTable(const StateLock& state, std::int64_t layer, TableCall* call) const;
  // Gives up what slots hold for handlers that have ended since.
  void ReleaseHeld(const MappingLock& lock);

  // ---- dropped beginnings (supply_drop.cc) ----
  // The slot no longer needs what is below its `dropped`, once handlers that run now have ended.
  void NoteDrop(const MappingLock&, std::int32_t slot) { drops_.push_back(slot); }
  // Unmaps what no handler uses any more of these slots.
  void FinishDrops(const MappingLock& lock);
  // What waits for handlers that have ended since.
  void FinishChanges(const MappingLock& lock) {
    ReleaseHeld(lock);
    FinishDrops(lock);
    FinishSwaps(lock);
  }

  // ---- swapped sequences (supply_swap.cc) ----
  SwapTable& swaps(const MappingLock&) { return swaps_; }
  // The slot's sequence has been taken: it comes free, without blocks, once no handler and no view uses it.
  void NoteSwap(const MappingLock&, std::int32_t slot) { emptying_.push_back(slot); }
  void FinishSwaps(const MappingLock& lock);
  // Blocks with one reference each that no slot maps, taken from donors and the prefix index where none is free.
  Claim ClaimBlocks(const MappingLock& lock, std::int64_t count, std::vector<std::int32_t>* blocks);
  // The same for blocks that will have memory in another file: see Arena::ClaimNumbers.
  Claim ClaimNumbers(const MappingLock& lock, std::int64_t count, std::vector<std::int32_t>* blocks);
  HandoverCounts& handovers(const MappingLock&) { return handovers_; }

  // Reserves in the account the mappings that a budget of `blocks` may need. Lowering the budget always succeeds.
  Status PromiseMappings(const MappingLock&, std::int64_t blocks);

  // See Candidates::BestFits. The slots stay idle while the lock is held.
  std::vector<std::int32_t> BestFits(const MappingLock& lock, const std::vector<std::int64_t>& blocks);

  // ---- sharing (supply_sharing.cc) ----
  // Free slots with the fewest blocks; fewer than `count` when there are no more.
  std::vector<std::int32_t> FewestBlocks(const MappingLock& lock, std::size_t count);
  // See Arena::Alias, SetAside and Separate. Mappings of the process are reserved first, and blocks taken from donors.
  // A failed Alias leaves some slots with blocks: empty them.
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
  // Blocks that are set aside for truncations whose programs will not run come free again.
  void DropStaleSetAside(const MappingLock& lock);
  // Whether a free slot must give up all its blocks before it gets a new owner: if any of them is or was shared with
  // other slots or is referenced by the prefix index, because the new owner must not write those; if the slot has
  // dropped its beginning; or if it keeps its blocks in a separate file.
  bool GivesUp(const MappingLock&, std::int32_t slot) const {
    return arena_->SharedBlocks(slot) > 0 || arena_->Borrows(slot) || arena_->HasCached(slot) ||
           arena_->hole(slot) > 0 || arena_->HasFile(slot);
  }
  Status DropShared(const MappingLock& lock, std::int32_t slot);
  // Free slots give up what live ones share: a truncation need not copy it then.
  Status DropFreeShared(const MappingLock& lock);
  // The same, and what the prefix index refers to: a view of all slots must not show it.
  Status DropFreeCached(const MappingLock& lock);

  // ---- the prefix index (supply_prefix.cc) ----
  // Made at the first call. Sequences are in it that were acquired by their tokens, and their forks.
  PrefixIndex& OpenIndex(const MappingLock& lock);
  const PrefixIndex* index(const MappingLock&) const { return index_.get(); }
  // Tokens that requests asked for by their ids, those that were found, and of these the ones that had been read from a
  // store for it.
  struct PrefixCounts {
    std::int64_t queries = 0, hits = 0, fetched = 0;
  };
  PrefixCounts& counts(const MappingLock&) { return counts_; }
  // What to call, with the mapping mutex held, when entries were evicted, and when a claim leaves less than a share of
  // the blocks free.
  void OnPressure(const MappingLock&, double free_share, std::function<void()> call) {
    free_share_ = free_share;
    on_pressure_ = std::move(call);
  }
  // Tells the index what slots hold now. Every look-up begins with this.
  void SyncIndex(const MappingLock& lock);
  // A slot is to write again from `tokens` on: the index drops what it has of it there.
  void CutIndex(const MappingLock& lock, std::int32_t slot, std::int64_t tokens);
  // An idle slot gives up all its blocks. The index keeps those that it refers to.
  Status Empty(const MappingLock& lock, std::int32_t slot);
  // Whether the process has enough memory mappings left for an Alias that needs this many.
  bool CanAlias(const MappingLock& lock, std::int64_t mappings);
  // Makes the index drop entries until at least `blocks` physical blocks come free. Returns how many. Where there are
  // not enough, all that there are with `partial`; else nothing is dropped.
  std::int64_t Evict(const MappingLock& lock, std::int64_t blocks, bool partial = false);
  // The same in two steps, so that several pools can drop the same entries. `allowed`: the first blocks of the entries
  // that may go; null: any.
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
  // The clock of pins, in seconds.
  static double Now();

  // ---- relocation (supply_relocate.cc) ----
  // Puts the contents of block `from`, which a slot maps at a place, or no slot (-1), into the free block `to`. Does
  // nothing, and `moved` is false, where things are different or a program could write the block.
  Status MoveBlock(const MappingLock& lock, std::int32_t slot, const Arena::Place& at, std::int32_t from,
                   std::int32_t to, bool* moved);

  // ---- one decision for several pools (supply_joint.cc) ----
  // All slots with blocks that they can give while `want` is to be met, in the order in which they give.
  std::vector<Donor> AllDonors(const MappingLock& lock, const Want& want);

  // ---- plans ----
  // How the wants would be met; they name different slots. When the blocks do not suffice, the claim says so and the
  // plan is of no use. `evict`: whether the prefix index may be made to drop entries now where that is needed; without,
  // the claim only says whether it would suffice.
  Claim Plan(const MappingLock& lock, const std::vector<Want>& wants, Source first, SupplyPlan* plan,
             bool evict = false);
  // Gives back at least `blocks` physical blocks, taking only unneeded ones that the prefix index does not refer to.
  SupplyPlan PlanReclaim(const MappingLock& lock, std::int64_t blocks);
  // Frees at least `blocks` physical blocks, if there are as many that are not needed; what the prefix index refers to
  // last.
  Status Reclaim(const MappingLock& lock, std::int64_t blocks);
  // Unmaps everything that is not needed and that the prefix index does not refer to.
  SupplyPlan PlanTrim(const MappingLock& lock);

  // ---- applying ----
  // Makes the changes of a plan, made under the same lock. A failure undoes what was done before it.
  // `system_short`: set when it was the system that had no memory for free blocks.
  Status Apply(const MappingLock& lock, const SupplyPlan& plan, bool* system_short = nullptr);
  // Takes back an applied plan: moved blocks return to their donors, claimed ones are free again.
  void Undo(const MappingLock& lock, const SupplyPlan& plan);
  // Plans and applies; plans again where the system has less memory than the capacity promises.
  Claim Reserve(const MappingLock& lock, const std::vector<Want>& wants, SupplyPlan* plan);

  // Whether Blank overwrites what a slot has.
  bool Blanks(const MappingLock&, std::int32_t slot) const { return poison_ || table_->viewed(table_->Lock(), slot); }
  // Sets the numbers of a claim that came to nothing.
  void Tally(const MappingLock& lock, const std::vector<Want>& wants, Claim* claim);
  // Overwrites logical blocks [begin, end) with what their new owner may see: zeros under a view, NaN as poison.
  Status Blank(const MappingLock& lock, std::int32_t slot, std::int64_t begin, std::int64_t end);

 private:
  // Which spare blocks of a slot count: all, or those at its end without other references.
  enum class Spare { kAll, kExclusive };
  // Brings the candidates up to date with the slots that have changed.
  void Refresh(const MappingLock& lock);
  // Slots among the changed ones that nobody has any more give up what they have from others.
  void EmptyBorrowers(const MappingLock& lock, const std::vector<std::int32_t>& changed);
  // Makes `count` blocks free.
  Claim FreeBlocks(const MappingLock& lock, std::int64_t count);
  // Reserves `more` mappings beyond those that blocks take which are mapped once.
  Status PromiseAliases(const MappingLock& lock, std::int64_t more);
  // See PrefixIndex::Cut.
  void Cut(const MappingLock& lock, std::int32_t slot, std::int64_t tokens, std::int64_t keep);
  // Entries whose loss frees at least `enough` blocks, or all that can go; `owners`: parked slots that map them.
  // `allowed`: as for PlanEvictionOf.
  std::vector<PrefixIndex::Eviction> PlanEviction(const MappingLock& lock, std::int64_t enough, std::int64_t* freed,
                                                  std::vector<std::int32_t>* owners,
                                                  const std::unordered_set<std::int32_t>* allowed = nullptr) const;
  // Logical blocks that slots could give while `wants` are to be met, if no block is shared.
  std::int64_t SpareBlocks(const std::vector<Want>& wants) const;
  // The slots with spare blocks while `wants` are to be met, in the order in which they give: the first ones, which
  // have at least `enough` logical blocks together, or all.
  std::vector<Donor> FindDonors(const std::vector<Want>& wants, Spare spare, std::int64_t enough) const;
  void UndoPart(const MappingLock& lock, const SupplyPlan& plan, std::size_t returns, std::size_t moves);

  SlotTable* const table_;
  MapPromise mappings_;              // ends after the memory does
  std::int64_t worst_mappings_ = 0;  // of the budget's blocks, each mapped once
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
