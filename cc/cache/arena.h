// Arena: blocks mapped into slots. It joins the numbers (BlockPool) and the page table (Vmm) so that each change is
// made in both or in neither.
//
// Logical blocks hole(slot)..blocks(slot)-1 of a slot are mapped in every one of its ranges. What is before them was
// dropped, what is behind them is not mapped yet. Several slots may map one block: each mapping is a reference, and a
// block comes free with the last of them, so the blocks of two slots must not be added up. Which slot may have how much
// is decided in supply.h. No locks: supply's mapping mutex guards it.
#ifndef KVPAGE_CACHE_ARENA_H_
#define KVPAGE_CACHE_ARENA_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "base/status.h"
#include "cache/block_pool.h"
#include "cache/block_table.h"
#include "cache/changed_slots.h"
#include "cache/geometry.h"
#include "cache/shared_runs.h"
#include "vmm/memory_file.h"
#include "vmm/vmm.h"

namespace kvpage {

class Arena {
 public:
  static Status Make(const Geometry& geometry, std::int64_t budget_blocks, std::unique_ptr<Vmm> vmm,
                     std::unique_ptr<Arena>* out);

  const Geometry& geometry() const { return geometry_; }
  const BlockPool& pool() const { return pool_; }
  // See BlockPool.
  void Prefer(std::vector<std::int32_t> blocks) { pool_.Prefer(std::move(blocks)); }
  // No free block has memory, and they are handed out in the order of their numbers.
  void Align() {
    Trim();
    pool_.SortCold();
  }
  const Vmm& vmm() const { return *vmm_; }
  char* base() const { return vmm_->base(); }
  // See Vmm::Window. Reserves it at the first call; from then on window() is its start, for any thread. A thread that
  // has copied rows of the block table before it asks for the start finds all their blocks there.
  Status OpenWindow();
  char* window() const { return window_.load(std::memory_order_acquire); }
  const BlockTable& block_table() const { return maps_; }
  // The memory outlives the arena: see Vmm::Abandon.
  void Abandon() { vmm_->Abandon(); }
  // See Vmm::Mover.
  Status Mover(std::shared_ptr<BlockMover>* out) { return vmm_->Mover(out); }

  // The end of the logical blocks that a slot maps in each range, and their beginning; and how many mappings of blocks
  // that makes in all ranges.
  std::int64_t blocks(std::int64_t slot) const {
    return static_cast<std::int64_t>(maps_[slot].size()) / geometry_.num_ranges();
  }
  std::int64_t hole(std::int64_t slot) const { return holes_[slot]; }
  std::int64_t mappings(std::int64_t slot) const { return (blocks(slot) - hole(slot)) * geometry_.num_ranges(); }
  // Physical block of each logical block of a range; -1: dropped.
  std::vector<std::int32_t> block_map(std::int64_t slot, std::int64_t range) const {
    return Gather(slot, range, 0, blocks(slot));
  }
  // The slots whose number of blocks has changed since the last call, once each, in no order.
  std::vector<std::int32_t> TakeChanged() { return changes_.Take(); }

  // The run of logical blocks at the end of a slot without other references, at most `most`: these can be moved
  // elsewhere, and come free when they are unmapped.
  std::int64_t ExclusiveTail(std::int64_t slot, std::int64_t most) const;
  // Physical blocks that would come free if the slot kept its first `blocks` logical blocks only.
  std::int64_t SpareOf(std::int64_t slot, std::int64_t blocks) const {
    return ExclusiveTail(slot, std::max<std::int64_t>(this->blocks(slot) - blocks, 0)) * geometry_.num_ranges();
  }
  // Physical blocks that would come free if these slots, each named once, were unmapped.
  std::int64_t FreedBy(const std::vector<std::int32_t>& slots) const;
  // Physical blocks mapped by each class of slots, `classes[slot]` being below `num_classes`. A block that slots of
  // several classes map counts once, for the lowest. A held block counts with its slot. `others`: blocks that swapped
  // sequences have, and their classes.
  using Classed = std::pair<std::int32_t, std::int8_t>;
  std::vector<std::int64_t> CountByClass(const std::vector<std::int8_t>& classes, int num_classes,
                                         const std::vector<Classed>& others = {}) const;

  // Maps what is missing up to `blocks` logical blocks. All or nothing.
  Status Grow(std::int64_t slot, std::int64_t blocks);
  // Maps used blocks, [count, ranges], for writing behind those that the slot has. They get a reference each. All or
  // nothing.
  Status Adopt(std::int64_t slot, const std::int32_t* map, std::int64_t count);
  // Unmaps what is beyond `blocks` logical blocks and drops the references. All or nothing.
  Status Shrink(std::int64_t slot, std::int64_t blocks);
  // Unmaps the logical blocks before `blocks`, which stay a hole until the slot has no blocks. All or nothing.
  Status DropBefore(std::int64_t slot, std::int64_t blocks);
  // Takes the last `blocks` logical blocks of one slot and appends them to another, without giving them up in between.
  // All or nothing.
  Status Move(std::int64_t from, std::int64_t to, std::int64_t blocks);
  // Overwrites what is mapped in logical blocks [begin, end) with one byte value.
  Status Fill(std::int64_t slot, std::int64_t begin, std::int64_t end, int byte);
  // Zeroes the mapped tokens of one layer from `token` on, keys and values.
  void ZeroTail(std::int64_t slot, std::int64_t layer, std::int64_t token);

  // ---- sharing (arena_sharing.cc) ----
  // Slots share blocks at the same logical positions. SharedBlocks: the end of the last logical block that another slot
  // maps too, or that this one took over and the prefix index refers to. ReadOnlyBlocks: those that this slot took over
  // from a donor or from the index, from its beginning.
  std::int64_t SharedBlocks(std::int64_t slot) const;
  // Logical blocks that another slot maps too.
  std::int64_t CountShared(std::int64_t slot) const;
  std::int64_t ReadOnlyBlocks(std::int64_t slot) const;
  // The slots that map the block at this place of a slot, in order.
  std::vector<std::int32_t> Mappers(std::int64_t slot, std::int64_t range, std::int64_t logical) const;
  // The physical blocks of a slot, [logical blocks, ranges]; -1: dropped.
  const std::int32_t* map(std::int64_t slot) const { return maps_[slot].data(); }
  // Maps these blocks, [blocks, ranges], as the first logical blocks of a slot that has none. All or nothing.
  Status Alias(std::int64_t to, const std::int32_t* map, std::int64_t blocks);
  // The same with the first blocks of another slot.
  Status Alias(std::int64_t from, std::int64_t to, std::int64_t blocks) { return Alias(to, map(from), blocks); }
  // A block that takes the place of another may split the mapping it stands in.
  static constexpr std::int64_t kSplits = 2;
  // Memory mappings that this may take; those that the slots may take beyond one for each block, now or once what is
  // set aside for them is mapped.
  std::int64_t AliasMappings(const std::int32_t* map, std::int64_t blocks) const;
  std::int64_t extra_mappings() const { return extra_mappings_ + kSplits * (num_set_aside_ + pool_.num_elsewhere()); }
  // Whether the prefix index has an entry for a logical block that is the slot's: it may write behind its tokens.
  using OwnsEntry = std::function<bool(std::int32_t slot, std::int64_t logical)>;
  // For each slot, the logical blocks from begins[i] on that need a copy and have no blocks set aside, if the slots are
  // separated in this order. The last one that maps a block keeps it, unless the prefix index refers to the block
  // beyond an entry of that slot. With `hold`, as for Separate, the slots before it still refer to the block when its
  // turn comes, so it needs a copy too.
  std::vector<std::vector<std::int64_t>> Missing(const std::vector<std::int32_t>& slots,
                                                 const std::vector<std::int64_t>& begins,
                                                 const OwnsEntry& owns_entry = nullptr, bool hold = false) const;
  // Claims a block for each range of these logical blocks, which Separate will map there.
  Status SetAside(std::int64_t slot, const std::vector<std::int64_t>& logical);
  void DropSetAside(std::int64_t slot, const std::vector<std::int64_t>& logical);
  // The same for all logical blocks from `begin` on.
  void DropSetAsideFrom(std::int64_t slot, std::int64_t begin);
  std::int64_t num_set_aside() const { return num_set_aside_; }
  // Whether blocks are set aside for the slot, so that Separate may exchange some.
  bool HasSetAside(std::int64_t slot) const {
    const auto found = borrowers_.find(static_cast<std::int32_t>(slot));
    return found != borrowers_.end() && !found->second.set_aside.empty();
  }
  // Makes the logical blocks from `begin` on the slot's own, for writing: copies take the place of those that other
  // slots share. Readers see the same bytes throughout. A failure leaves a part of them exchanged.
  // With `hold` the slot keeps its references to the shared blocks until ReleaseHeld, for readers that know them by
  // number.
  Status Separate(std::int64_t slot, std::int64_t begin, bool hold = false);
  // A block that a slot no longer maps and that readers of the slot may still use.
  struct Held {
    std::int32_t slot = 0;
    std::int32_t block = 0;
  };
  const std::vector<Held>& held() const { return held_; }
  // Drops the references that these slots hold, [slots].
  void ReleaseHeld(const std::vector<bool>& slots);
  // Whether the slot has read-only blocks, or blocks set aside. Another request cannot adopt it before it is emptied.
  bool Borrows(std::int64_t slot) const { return borrowers_.count(static_cast<std::int32_t>(slot)) > 0; }
  // May be asked at any time, by any thread.
  const SharedRuns& shared_runs() const { return shared_runs_; }
  // A copy of them is kept for programs on a device. Before anything is mapped.
  void FollowRuns(Mirror* mirror) { shared_runs_.Follow(mirror); }

  // ---- blocks that the prefix index refers to ----
  void SetCached(const std::vector<std::int32_t>& blocks) {
    for (const std::int32_t block : blocks) pool_.SetCached(block);
  }
  void DropCached(const std::vector<std::int32_t>& blocks) {
    for (const std::int32_t block : blocks) pool_.DropCached(block);
  }
  // Blocks with one reference each that no slot maps. All or nothing.
  Status Claim(std::int64_t count, std::vector<std::int32_t>* blocks);
  // The same for blocks that will be filled through the window while no lock is held.
  Status ClaimToFill(std::int64_t count, std::vector<std::int32_t>* blocks);
  // Drops these references: a block that is not cached by then is free again.
  void DropFilled(const std::vector<std::int32_t>& blocks);
  // Marks used blocks as being read through the window without a lock. They may be freed and claimed meanwhile, but
  // their memory is not returned to the system.
  void StartReading(const std::vector<std::int32_t>& blocks) {
    for (const std::int32_t block : blocks) pool_.StartReading(block);
  }
  void EndReading(const std::vector<std::int32_t>& blocks) {
    for (const std::int32_t block : blocks) pool_.EndReading(block);
  }
  std::int64_t num_filling() const { return static_cast<std::int64_t>(filling_.size()); }
  // Keeps cached blocks that no slot maps while a claim goes on, and no longer.
  void Hold(const std::vector<std::int32_t>& blocks) {
    for (const std::int32_t block : blocks) pool_.AddReference(block);
  }
  void Drop(const std::vector<std::int32_t>& blocks) {
    for (const std::int32_t block : blocks) pool_.Release(block);
  }
  // Whether a slot maps a cached block, from logical block `begin` on.
  bool HasCached(std::int64_t slot, std::int64_t begin = 0) const;
  // The run of logical blocks at the end of a slot that are not cached.
  std::int64_t UncachedTail(std::int64_t slot) const;
  // Overwrites a logical block with the bytes of others, [ranges].
  Status CopyBlock(std::int64_t slot, std::int64_t logical, const std::int32_t* from);

  // ---- relocation (arena_relocate.cc) ----
  // A place in the slots that map a block: all of them map it at the same one.
  struct Place {
    std::int64_t range = 0;
    std::int64_t logical = 0;
  };
  // Puts a free block in the place of another, which comes free, with its contents, references and entry. `mappers`:
  // all slots that map it; none, and `at` does not matter, for a cached block without a slot. Readers see the same
  // bytes throughout; nobody may write. `holders`, some of the slots, keep a reference to the old block until
  // ReleaseHeld. `created`: one more block has memory now. All or nothing.
  Status Exchange(std::int32_t from, std::int32_t to, const Place& at, const std::vector<std::int32_t>& mappers,
                  const std::vector<std::int32_t>& holders, bool* created);
  // Puts used blocks from `first` on into huge pages. See Vmm::Collapse.
  Status Collapse(std::int32_t first, std::int64_t count) { return vmm_->Collapse(first, count); }
  // Gives the memory of a free block back to the system.
  void Cool(std::int32_t block);
  // Memory mappings of all slots' blocks, if none merges with one of another slot.
  std::int64_t CountMemoryMappings() const;

  // ---- blocks in other files: see handover.h (arena_handover.cc) ----
  // Blocks with one reference each that no slot maps and that have no memory, in ascending order. All or nothing.
  Status ClaimNumbers(std::int64_t count, std::vector<std::int32_t>* blocks);
  void UnclaimNumbers(const std::vector<std::int32_t>& blocks) { pool_.Unclaim(blocks, blocks); }
  // Backs such blocks with a received file, or with imported handles. All or nothing.
  Status Receive(const std::shared_ptr<MemoryFile>& file, const std::vector<std::int32_t>& blocks,
                 const std::vector<std::int64_t>& offsets);
  Status ReceiveHandles(const std::vector<int>& descriptors, const std::vector<std::int32_t>& blocks);
  // These forward to Vmm.
  bool shares_handles() const { return vmm_->shares_handles(); }
  Status MemoryName(std::string* out) { return vmm_->MemoryName(out); }
  Status ExportBlocks(const std::vector<std::int32_t>& blocks, std::vector<Fd>* out) {
    return vmm_->Export(blocks.data(), static_cast<std::int64_t>(blocks.size()), out);
  }
  Status ExportCopies(const std::vector<Vmm::CopySource>& blocks, std::int64_t payload, std::vector<Fd>* out) {
    return vmm_->ExportCopies(blocks, payload, out);
  }
  Status CopyHandles(const std::vector<int>& descriptors, const std::vector<std::int32_t>& blocks) {
    return vmm_->ImportCopies(descriptors, blocks.data());
  }
  // Lets a slot without blocks take all its memory from a file of which it is the only user, until the slot is emptied
  // or the file sealed: block b of range r is (r * max_blocks + b) blocks after `begin`. With shared handles the blocks
  // are not in the file but are still accounted to it.
  void SetFile(std::int64_t slot, std::shared_ptr<MemoryFile> file, std::int64_t begin);
  bool HasFile(std::int64_t slot) const { return files_.count(static_cast<std::int32_t>(slot)) > 0; }
  void CloseFile(std::int64_t slot) { files_.erase(static_cast<std::int32_t>(slot)); }
  // The file, if the first logical blocks of the slot are all that is in it; else null. Some of a slot's blocks are
  // elsewhere once it shared them and wrote them again.
  std::shared_ptr<MemoryFile> WholeFile(std::int64_t slot, std::int64_t blocks) const;
  // Seals such a file. From now on the slot may only read these blocks. No handler runs on the slot. All or nothing.
  Status SealFile(std::int64_t slot, std::int64_t blocks);

  // For tests. Checks the counts of every block: a reference for each mapping, for each hold, for being set aside and
  // for being filled; at most one entry of the prefix index; used if it has either. `others`: blocks that swapped
  // sequences have, once for each reference.
  Status Audit(const std::vector<std::int32_t>& others = {}) const;
  // Gives the memory of all free blocks back to the system; returns how many there were.
  std::int64_t Trim();
  // Changes the budget; what is used must fit.
  Status SetBudget(std::int64_t budget_blocks);

 private:
  Arena(const Geometry& geometry, std::int64_t budget_blocks, std::unique_ptr<Vmm> vmm);
  // Physical blocks of `count` logical blocks of a range, from logical block `begin` on.
  std::vector<std::int32_t> Gather(std::int64_t slot, std::int64_t range, std::int64_t begin, std::int64_t count) const;
  // As in BlockTable; the slot counts as changed.
  void Append(std::int64_t slot, const std::vector<std::int32_t>& blocks);
  void Truncate(std::int64_t slot, std::int64_t blocks);

  // Keeps shared_runs_: from now on the slot is the one that writes its blocks from `begin` on; a slot was given these
  // blocks of others.
  void NoteWriter(std::int64_t slot, std::int64_t begin);
  void NoteShared(std::int64_t to, const std::int32_t* map, std::int64_t blocks);
  void Forget(std::int64_t slot);
  // The slot has `blocks` logical blocks left.
  void ForgetBeyond(std::int64_t slot, std::int64_t blocks);

  Status GrowInFile(std::int64_t slot, std::int64_t blocks);
  struct SlotFile {
    std::shared_ptr<MemoryFile> file;
    std::int64_t begin = 0;
  };

  struct Borrower {
    std::int64_t read_only = 0;                                   // logical blocks
    std::int64_t mappings = 0;                                    // its part of extra_mappings_
    std::map<std::int64_t, std::vector<std::int32_t>> set_aside;  // [logical block] of [ranges]; -1: exchanged
  };

  const Geometry geometry_;
  BlockPool pool_;
  std::unique_ptr<Vmm> vmm_;
  BlockTable maps_;
  std::vector<std::int64_t> holes_;  // [slots] logical blocks at the beginning that are dropped
  std::atomic<char*> window_{nullptr};
  std::vector<Held> held_;
  ChangedSlots changes_;
  SharedRuns shared_runs_;
  std::vector<std::int32_t> writers_;  // [blocks] of a first range: the slot that was given it for writing
  std::map<std::int32_t, Borrower> borrowers_;
  std::map<std::int32_t, SlotFile> files_;
  std::int64_t extra_mappings_ = 0;
  std::int64_t num_set_aside_ = 0;            // physical blocks
  std::unordered_set<std::int32_t> filling_;  // blocks claimed to be filled
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_ARENA_H_
