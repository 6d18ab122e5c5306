// BlockPool: bookkeeping of physical blocks: which blocks exist, how many references each has, and which one to hand
// out next.
//
// A block is used (mapped by a slot, or cached: the prefix index refers to it), warm (free, with its memory still
// allocated) or cold (free, without memory). The budget limits used + warm; after a resize block numbers may exceed it,
// so shrinking never moves data. Free blocks are in two intrusive lists, so taking any particular block (for example
// the neighbour of a slot's last block) is O(1).
//
// No system calls and no locks: the arena maps blocks, and the mapping mutex of supply.h guards both.
#ifndef KVPAGE_CACHE_BLOCK_POOL_H_
#define KVPAGE_CACHE_BLOCK_POOL_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace kvpage {

// Where a block's memory is: in the pool's own memory or in another file (memory_file.h). On a device: whether the
// block was or may be handed over. Sealed blocks are read-only in all slots that map them.
enum class Backing : std::int8_t {
  kOwn = 0,
  kLent,      // in a slot's own file, for a sequence that may be handed over
  kSealed,    // like kLent, after it was handed over
  kReceived,  // also sealed: created by another pool
};
constexpr int kNumBackings = 4;

class BlockPool {
 public:
  explicit BlockPool(std::int64_t budget) { SetBudget(budget); }

  std::int64_t budget() const { return budget_; }
  std::int64_t num_used() const { return num_used_; }
  std::int64_t num_warm() const { return lists_[kWarm].size; }
  std::int64_t num_free() const { return budget_ - num_used_; }
  // All block numbers that were ever valid are below this.
  std::int64_t num_blocks() const { return static_cast<std::int64_t>(blocks_.size()); }
  // The most blocks in use at any NotePeak(), which is called for successful claims only.
  std::int64_t peak_used() const { return peak_used_; }
  void NotePeak() { peak_used_ = num_used_ > peak_used_ ? num_used_ : peak_used_; }
  // References of a block, which are its mappings, and the number of blocks with more than one.
  std::int32_t references(std::int32_t block) const { return blocks_[block].references; }
  std::int64_t num_shared() const { return num_shared_; }
  bool cached(std::int32_t block) const { return blocks_[block].entries > 0; }
  // Number of prefix index entries that refer to a block. Some may have fewer of its tokens than others.
  std::int32_t entries(std::int32_t block) const { return blocks_[block].entries; }
  std::int64_t num_cached() const { return num_cached_; }
  // Number of cached blocks that no slot maps.
  std::int64_t num_detached() const { return num_detached_; }

  // Claims `count` blocks with one reference each; returns false and claims none if there are too few. Blocks that were
  // cold, and whose memory the caller must create, are also appended to `cold`. Warm blocks are preferred and, among
  // equals, the block that follows the previous one (`after` for the first): adjacent blocks of a memory file share one
  // mapping.
  bool Claim(std::int64_t count, std::int32_t after, std::vector<std::int32_t>* blocks,
             std::vector<std::int32_t>* cold);
  // The next claims take these free blocks first, in this order, until the next call of Prefer.
  void Prefer(std::vector<std::int32_t> blocks) {
    preferred_ = std::move(blocks);
    next_preferred_ = 0;
  }
  bool warm(std::int32_t block) const { return blocks_[block].kind == kWarm; }
  // Iterates over the free blocks, warm ones first; -1 after the last.
  std::int32_t FirstFree() const { return lists_[kWarm].head >= 0 ? lists_[kWarm].head : lists_[kCold].head; }
  std::int32_t NextFree(std::int32_t block) const {
    const Block& entry = blocks_[block];
    return entry.next >= 0 || entry.kind == kCold ? entry.next : lists_[kCold].head;
  }
  // Undoes a claim whose cold blocks could not be created: these become cold again, the others warm.
  void Unclaim(const std::vector<std::int32_t>& blocks, const std::vector<std::int32_t>& cold);

  // The memory of a used block is elsewhere from now on. When the block becomes free it is cold, and OnReturned is
  // called.
  void SetBacking(std::int32_t block, Backing backing);
  Backing backing(std::int32_t block) const { return blocks_[block].backing; }
  // Whether nobody may write the block, no matter how few references it has.
  bool sealed(std::int32_t block) const { return blocks_[block].backing >= Backing::kSealed; }
  std::int64_t num_backed(Backing backing) const { return num_backed_[static_cast<int>(backing)]; }
  std::int64_t num_sealed() const { return num_backed(Backing::kSealed) + num_backed(Backing::kReceived); }
  std::int64_t num_elsewhere() const { return num_backed(Backing::kLent) + num_sealed(); }
  void OnReturned(std::function<void(std::int32_t)> call) { on_returned_ = std::move(call); }

  // Claims this block, with one reference; *cold: whether it was cold. Returns false if it is in use, or if no block is
  // free.
  bool ClaimBlock(std::int32_t block, bool* cold);
  // Transfers the references and entries of block `from` to the claimed block `to`, except for `held` references.
  // `from` becomes warm if it keeps none.
  void Replace(std::int32_t from, std::int32_t to, std::int32_t held);
  bool free(std::int32_t block) const { return blocks_[block].kind != kUsed; }

  void AddReference(std::int32_t block) {
    const std::int32_t now = ++blocks_[block].references;
    if (now == 2) ++num_shared_;
    if (now == 1) --num_detached_;  // a block without references was only cached
  }
  // Drops a reference; a block without references becomes warm unless it is cached.
  void Release(std::int32_t block);
  // Adds (removes) an entry of the prefix index that refers to a used block.
  void SetCached(std::int32_t block);
  void DropCached(std::int32_t block);

  // Turns up to `count` warm blocks cold, skipping those being read; the caller destroys them.
  std::vector<std::int32_t> Cool(std::int64_t count);
  // Marks a block as being read without a reference: it may be freed and claimed meanwhile, but keeps its memory.
  void StartReading(std::int32_t block) { ++readers_[block]; }
  void EndReading(std::int32_t block) {
    const auto found = readers_.find(block);
    if (--found->second == 0) readers_.erase(found);
  }
  // From now on cold blocks are handed out in numerical order.
  void SortCold();
  // Makes one warm block cold.
  void CoolBlock(std::int32_t block);

  // Used and warm blocks must fit (call Cool first). Growing adds block numbers.
  void SetBudget(std::int64_t budget);

 private:
  enum Kind : std::int8_t { kWarm = 0, kCold = 1, kUsed = 2 };
  struct Block {
    std::int32_t references = 0;
    std::int32_t entries = 0;
    std::int32_t previous = -1;
    std::int32_t next = -1;
    Kind kind = kCold;
    Backing backing = Backing::kOwn;
  };
  struct List {
    std::int32_t head = -1;
    std::int32_t tail = -1;
    std::int64_t size = 0;
  };
  void PushFront(Kind kind, std::int32_t block);
  void PushBack(Kind kind, std::int32_t block);
  void Remove(std::int32_t block);
  void Free(std::int32_t block);
  std::int32_t Pick(std::int32_t after) const;

  std::vector<Block> blocks_;
  List lists_[2];
  std::int64_t budget_ = 0;
  std::int64_t num_used_ = 0;
  std::int64_t peak_used_ = 0;
  std::int64_t num_shared_ = 0;
  std::int64_t num_cached_ = 0;
  std::int64_t num_detached_ = 0;
  std::vector<std::int32_t> preferred_;
  std::size_t next_preferred_ = 0;
  std::unordered_map<std::int32_t, std::int32_t> readers_;  // by block; number of reads without a reference
  std::int64_t num_backed_[kNumBackings] = {};              // number of blocks outside of the pool's own memory
  std::function<void(std::int32_t)> on_returned_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_BLOCK_POOL_H_
