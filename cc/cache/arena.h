// Arena: blocks mapped into slots. It combines block numbers (BlockPool) and the page table (Vmm), so that each change
// is made in both or in neither.
//
// Logical blocks hole(slot) .. blocks(slot) - 1 of a slot are mapped in each of its ranges. Blocks before them were
// dropped; blocks after them are not mapped yet. Several slots may map the same block: each mapping is a reference, and
// a block becomes free when its last reference is dropped, so the block counts of slots must not be added up. supply.h
// decides which slot gets how many blocks. The arena has no locks: supply's mapping mutex guards it.
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
  // No free block has memory afterwards, and free blocks are handed out in numerical order.
  void Align() {
    Trim();
    pool_.SortCold();
  }
  const Vmm& vmm() const { return *vmm_; }
  char* base() const { return vmm_->base(); }
  // See Vmm::Window. Reserves the window at the first call; afterwards window() is its start, for any thread. If a
  // thread copies rows of the block table before it reads window(), all blocks in these rows are in the window.
  Status OpenWindow();
  char* window() const { return window_.load(std::memory_order_acquire); }
  const BlockTable& block_table() const { return maps_; }
  // The memory outlives the arena: see Vmm::Abandon.
  void Abandon() { vmm_->Abandon(); }
  // See Vmm::Mover.
  Status Mover(std::shared_ptr<BlockMover>* out) { return vmm_->Mover(out); }

  // The end and the beginning of the logical blocks that a slot maps in each range, and the number of mappings that
  // this makes over all ranges.
  std::int64_t blocks(std::int64_t slot) const {
    return static_cast<std::int64_t>(maps_[slot].size()) / geometry_.num_ranges();
  }
  std::int64_t hole(std::int64_t slot) const { return holes_[slot]; }
  std::int64_t mappings(std::int64_t slot) const { return (blocks(slot) - hole(slot)) * geometry_.num_ranges(); }
  // Physical block of each logical block of a range; -1: dropped.
  std::vector<std::int32_t> block_map(std::int64_t slot, std::int64_t range) const {
    return Gather(slot, range, 0, blocks(slot));
  }
  // The slots whose number of blocks has changed since the last call, each once, in no particular order.
  std::vector<std::int32_t> TakeChanged() { return changes_.Take(); }

  // The number of logical blocks at the end of a slot, at most `most`, that have no other references. These can be
  // moved elsewhere, and become free when they are unmapped.
  std::int64_t ExclusiveTail(std::int64_t slot, std::int64_t most) const;
  // Number of physical blocks that would become free if the slot kept only its first `blocks` logical blocks.
  std::int64_t SpareOf(std::int64_t slot, std::int64_t blocks) const {
    return ExclusiveTail(slot, std::max<std::int64_t>(this->blocks(slot) - blocks, 0)) * geometry_.num_ranges();
  }
  // Number of physical blocks that would become free if these slots, which must be distinct, were unmapped.
  std::int64_t FreedBy(const std::vector<std::int32_t>& slots) const;
  // Number of physical blocks mapped by each class of slots; `classes[slot]` must be below `num_classes`. A block that
  // slots of several classes map counts once, for the lowest class. A held block counts for its slot. `others`: blocks
  // of swapped sequences, with their classes.
  using Classed = std::pair<std::int32_t, std::int8_t>;
  std::vector<std::int64_t> CountByClass(const std::vector<std::int8_t>& classes, int num_classes,
                                         const std::vector<Classed>& others = {}) const;

  // Maps the missing blocks, up to `blocks` logical blocks. All or nothing.
  Status Grow(std::int64_t slot, std::int64_t blocks);
  // Maps used blocks, [count, ranges], after those of the slot, for writing. Each gets a reference. All or nothing.
  Status Adopt(std::int64_t slot, const std::int32_t* map, std::int64_t count);
  // Unmaps logical blocks from `blocks` on and drops their references. All or nothing.
  Status Shrink(std::int64_t slot, std::int64_t blocks);
  // Unmaps the logical blocks before `blocks`, which remain a hole until the slot has no blocks. All or nothing.
  Status DropBefore(std::int64_t slot, std::int64_t blocks);
  // Moves the last `blocks` logical blocks of one slot to the end of another, without freeing them in between. All or
  // nothing.
  Status Move(std::int64_t from, std::int64_t to, std::int64_t blocks);
  // Overwrites the memory of logical blocks [begin, end) with one byte value.
  Status Fill(std::int64_t slot, std::int64_t begin, std::int64_t end, int byte);
  // Zeroes the mapped keys and values of one layer from `token` on.
  void ZeroTail(std::int64_t slot, std::int64_t layer, std::int64_t token);

  // ---- sharing (arena_sharing.cc) ----
  // Slots share blocks at the same logical positions. SharedBlocks is the end of the last logical block that another
  // slot maps too, or that this slot took over and the prefix index refers to. ReadOnlyBlocks is the number of leading
  // blocks that this slot took over from a donor or from the index.
  std::int64_t SharedBlocks(std::int64_t slot) const;
  // Number of logical blocks that another slot maps too.
  std::int64_t CountShared(std::int64_t slot) const;
  std::int64_t ReadOnlyBlocks(std::int64_t slot) const;
  // The slots that map the block at this place of a slot, in ascending order.
  std::vector<std::int32_t> Mappers(std::int64_t slot, std::int64_t range, std::int64_t logical) const;
  // The physical blocks of a slot, [logical blocks, ranges]; -1: dropped.
  const std::int32_t* map(std::int64_t slot) const { return maps_[slot].data(); }
  // Maps these blocks, [blocks, ranges], as the first logical blocks of an empty slot. All or nothing.
  Status Alias(std::int64_t to, const std::int32_t* map, std::int64_t blocks);
  // The same with the first blocks of another slot.
  Status Alias(std::int64_t from, std::int64_t to, std::int64_t blocks) { return Alias(to, map(from), blocks); }
  // When a block replaces another, it may split the memory mapping that contains it.
  static constexpr std::int64_t kSplits = 2;
  // AliasMappings: memory mappings that Alias may need. extra_mappings: mappings that slots may need in addition to one
  // per block, now or once the blocks set aside for them are mapped.
  std::int64_t AliasMappings(const std::int32_t* map, std::int64_t blocks) const;
  std::int64_t extra_mappings() const { return extra_mappings_ + kSplits * (num_set_aside_ + pool_.num_elsewhere()); }
  // Whether the prefix index has an entry of the slot for this logical block, so that the slot may write after its
  // tokens.
  using OwnsEntry = std::function<bool(std::int32_t slot, std::int64_t logical)>;
  // For each slot, the logical blocks from begins[i] on that need a copy and have no blocks set aside, if the slots are
  // separated in this order. The last slot that maps a block keeps it, unless the prefix index refers to more of the
  // block than an entry of this slot. With `hold` (see Separate), earlier slots still refer to the block at that point,
  // so the last slot needs a copy too.
  std::vector<std::vector<std::int64_t>> Missing(const std::vector<std::int32_t>& slots,
                                                 const std::vector<std::int64_t>& begins,
                                                 const OwnsEntry& owns_entry = nullptr, bool hold = false) const;
  // Claims a block in each range for each of these logical blocks; Separate will map them.
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
  // Makes the logical blocks from `begin` on private to the slot, for writing: those that other slots share are
  // replaced by copies. Readers see the same bytes throughout. If it fails, some blocks may have been replaced.
  // With `hold`, the slot keeps its references to the shared blocks until ReleaseHeld, for readers that know them by
  // number.
  Status Separate(std::int64_t slot, std::int64_t begin, bool hold = false);
  // A block that a slot no longer maps, but that readers of the slot may still use.
  struct Held {
    std::int32_t slot = 0;
    std::int32_t block = 0;
  };
  const std::vector<Held>& held() const { return held_; }
  // Drops the references that these slots hold, [slots].
  void ReleaseHeld(const std::vector<bool>& slots);
  // Whether the slot has read-only blocks or blocks set aside. It must be emptied before another request can adopt it.
  bool Borrows(std::int64_t slot) const { return borrowers_.count(static_cast<std::int32_t>(slot)) > 0; }
  // Thread-safe, can be called at any time.
  const SharedRuns& shared_runs() const { return shared_runs_; }
  // Makes `mirror` keep a copy of the runs for programs on a device. Call it before anything is mapped.
  void FollowRuns(Mirror* mirror) { shared_runs_.Follow(mirror); }

  // ---- blocks that the prefix index refers to ----
  void SetCached(const std::vector<std::int32_t>& blocks) {
    for (const std::int32_t block : blocks) pool_.SetCached(block);
  }
  void DropCached(const std::vector<std::int32_t>& blocks) {
    for (const std::int32_t block : blocks) pool_.DropCached(block);
  }
  // Claims blocks with one reference each that no slot maps. All or nothing.
  Status Claim(std::int64_t count, std::vector<std::int32_t>* blocks);
  // The same for blocks that will be filled through the window without holding a lock.
  Status ClaimToFill(std::int64_t count, std::vector<std::int32_t>* blocks);
  // Drops these references; blocks that are not cached by then become free.
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
  // Keeps cached blocks that no slot maps during a claim, but not longer.
  void Hold(const std::vector<std::int32_t>& blocks) {
    for (const std::int32_t block : blocks) pool_.AddReference(block);
  }
  void Drop(const std::vector<std::int32_t>& blocks) {
    for (const std::int32_t block : blocks) pool_.Release(block);
  }
  // Whether a slot maps a cached block, from logical block `begin` on.
  bool HasCached(std::int64_t slot, std::int64_t begin = 0) const;
  // The number of logical blocks at the end of a slot that are not cached.
  std::int64_t UncachedTail(std::int64_t slot) const;
  // Overwrites a logical block with the contents of other blocks, [ranges].
  Status CopyBlock(std::int64_t slot, std::int64_t logical, const std::int32_t* from);

  // ---- relocation (arena_relocate.cc) ----
  // A place that is the same in all slots that map a block.
  struct Place {
    std::int64_t range = 0;
    std::int64_t logical = 0;
  };
  // Replaces block `from` by the free block `to`, which takes over its contents, references and index entry; `from`
  // becomes free. `mappers` are all slots that map it, or empty for a cached block without a slot (`at` is then
  // ignored). Readers see the same bytes throughout; nobody may write. `holders`, a subset of the slots, keep a
  // reference to the old block until ReleaseHeld. `created`: one more block has memory now. All or nothing.
  Status Exchange(std::int32_t from, std::int32_t to, const Place& at, const std::vector<std::int32_t>& mappers,
                  const std::vector<std::int32_t>& holders, bool* created);
  // Moves used blocks from `first` on into huge pages. See Vmm::Collapse.
  Status Collapse(std::int32_t first, std::int64_t count) { return vmm_->Collapse(first, count); }
  // Returns the memory of a free block to the system.
  void Cool(std::int32_t block);
  // The number of memory mappings for the blocks of all slots, if mappings of different slots never merge.
  std::int64_t CountMemoryMappings() const;

  // ---- blocks in other files: see handover.h (arena_handover.cc) ----
  // Claims blocks without memory, with one reference each, that no slot maps, in ascending order. All or nothing.
  Status ClaimNumbers(std::int64_t count, std::vector<std::int32_t>* blocks);
  void UnclaimNumbers(const std::vector<std::int32_t>& blocks) { pool_.Unclaim(blocks, blocks); }
  // Backs these blocks with a received file or with imported handles. All or nothing.
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
  // Makes an empty slot take all its memory from a file, of which it is the only user, until the slot is emptied or the
  // file is sealed. Block b of range r is (r * max_blocks + b) blocks after `begin`. With shared handles, blocks are
  // not in the file but are still accounted to it.
  void SetFile(std::int64_t slot, std::shared_ptr<MemoryFile> file, std::int64_t begin);
  bool HasFile(std::int64_t slot) const { return files_.count(static_cast<std::int32_t>(slot)) > 0; }
  void CloseFile(std::int64_t slot) { files_.erase(static_cast<std::int32_t>(slot)); }
  // Returns the file if it contains exactly the first `blocks` logical blocks of the slot; otherwise null. Once a slot
  // has shared blocks and written them again, some of its blocks are elsewhere.
  std::shared_ptr<MemoryFile> WholeFile(std::int64_t slot, std::int64_t blocks) const;
  // Seals such a file. The slot may only read these blocks afterwards. No handler may be using the slot. All or
  // nothing.
  Status SealFile(std::int64_t slot, std::int64_t blocks);

  // For tests. Checks the counts of every block: one reference for each mapping, each hold, being set aside and being
  // filled; at most one entry of the prefix index; in use if it has a reference or an entry. `others`: blocks of
  // swapped sequences, once for each reference.
  Status Audit(const std::vector<std::int32_t>& others = {}) const;
  // Returns the memory of all free blocks to the system; returns the number of these blocks.
  std::int64_t Trim();
  // Changes the budget; the blocks in use must fit.
  Status SetBudget(std::int64_t budget_blocks);

 private:
  Arena(const Geometry& geometry, std::int64_t budget_blocks, std::unique_ptr<Vmm> vmm);
  // The physical blocks of `count` logical blocks in a range, from logical block `begin` on.
  std::vector<std::int32_t> Gather(std::int64_t slot, std::int64_t range, std::int64_t begin, std::int64_t count) const;
  // Like BlockTable::Append; also marks the slot as changed.
  void Append(std::int64_t slot, const std::vector<std::int32_t>& blocks);
  void Truncate(std::int64_t slot, std::int64_t blocks);

  // Updates shared_runs_: from now on this slot writes its blocks from `begin` on; a slot was given these blocks of
  // other slots.
  void NoteWriter(std::int64_t slot, std::int64_t begin);
  void NoteShared(std::int64_t to, const std::int32_t* map, std::int64_t blocks);
  void Forget(std::int64_t slot);
  // The slot has only its first `blocks` logical blocks left.
  void ForgetBeyond(std::int64_t slot, std::int64_t blocks);

  Status GrowInFile(std::int64_t slot, std::int64_t blocks);
  struct SlotFile {
    std::shared_ptr<MemoryFile> file;
    std::int64_t begin = 0;
  };

  struct Borrower {
    std::int64_t read_only = 0;                                   // logical blocks
    std::int64_t mappings = 0;                                    // the slot's part of extra_mappings_
    std::map<std::int64_t, std::vector<std::int32_t>> set_aside;  // [logical block] of [ranges]; -1: already exchanged
  };

  const Geometry geometry_;
  BlockPool pool_;
  std::unique_ptr<Vmm> vmm_;
  BlockTable maps_;
  std::vector<std::int64_t> holes_;  // [slots] number of dropped logical blocks at the beginning
  std::atomic<char*> window_{nullptr};
  std::vector<Held> held_;
  ChangedSlots changes_;
  SharedRuns shared_runs_;
  std::vector<std::int32_t> writers_;  // [blocks] of a first range: the slot that got the block for writing
  std::map<std::int32_t, Borrower> borrowers_;
  std::map<std::int32_t, SlotFile> files_;
  std::int64_t extra_mappings_ = 0;
  std::int64_t num_set_aside_ = 0;            // physical blocks
  std::unordered_set<std::int32_t> filling_;  // blocks claimed to be filled
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_ARENA_H_
