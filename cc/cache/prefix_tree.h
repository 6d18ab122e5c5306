// PrefixTree: the entries of the prefix index, and how tokens find them.
//
// An entry is one logical block after its parent, which is the entry of the block before it (or the root of a
// namespace). Full blocks are found by the hash of the prefix that ends with them: the blocks of a prompt are looked up
// several at a time, so that a walk does not wait for memory at every block. If no full block continues a match, the
// parent's children, which are sorted by their tokens, are searched for the one that matches furthest. Tokens are
// always compared. Bookkeeping only: the index (prefix_index.h) decides what is stored and removed.
#ifndef KVPAGE_CACHE_PREFIX_TREE_H_
#define KVPAGE_CACHE_PREFIX_TREE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "cache/prefix_events.h"

namespace kvpage {

constexpr std::int32_t kNoEntry = -1;

// What the index knows about an entry's copy in the pool's store.
enum class StoreState : std::int8_t {
  kUnwritten = 0,
  kWriting,
  kWritten,
  kFailed,  // not retried until something continues it
  kLost,    // was in the store; not rewritten until a request asks for it
};

struct alignas(64) PrefixEntry {   // one cache line
  std::uint64_t hash = 0;          // of the prefix that ends with this block, if it is full
  std::int32_t parent = kNoEntry;  // kNoEntry: a root
  std::int32_t depth = -1;         // the logical block's index; -1: a root
  std::int32_t tokens = 0;         // 0 for a root or an unused entry
  std::int32_t owner = -1;         // the slot that wrote it and still maps it
  std::int32_t first_tip = -1;     // first of the slots whose sequence ends here (slot_sequences.h)
  std::int32_t pins = 0;           // number of pinned prefixes through it
  std::int32_t space = -1;         // the number of its namespace
  bool listed = false;             // may be evicted next
  bool dropped = false;            // evict before others (a hint)
  bool fetched = false;            // read from a store and not requested since
  StoreState stored = StoreState::kUnwritten;
  std::vector<std::int32_t> children;  // sorted by their tokens
};

class PrefixTree {
 public:
  PrefixTree(std::int64_t block_tokens, std::int64_t ranges) : block_tokens_(block_tokens), ranges_(ranges) {}

  PrefixEntry& entry(std::int32_t id) { return entries_[id >> kChunkBits][id & kChunkMask]; }
  const PrefixEntry& entry(std::int32_t id) const { return entries_[id >> kChunkBits][id & kChunkMask]; }
  const std::int32_t* tokens(std::int32_t id) const { return Row(id); }
  const std::int32_t* blocks(std::int32_t id) const { return Row(id) + block_tokens_; }
  // Number of tokens before those of the entry; negative for a root.
  std::int64_t Begin(std::int32_t id) const { return entry(id).depth * block_tokens_; }
  bool Whole(std::int32_t id) const { return entry(id).tokens == block_tokens_; }
  std::int64_t num_entries() const { return num_entries_; }  // excluding roots
  std::int64_t num_tokens() const { return num_tokens_; }
  std::int64_t block_tokens() const { return block_tokens_; }
  std::int64_t ranges() const { return ranges_; }

  // Records blocks that become full or cease to be.
  PrefixEvents& events() { return events_; }
  PrefixEvent StoredEvent(std::int32_t id) const;

  std::int32_t AddRoot(std::uint64_t hash, std::int32_t space);
  // Adds an entry that continues `parent` with `tokens`, which must not exist yet.
  std::int32_t Add(std::int32_t parent, const std::int32_t* tokens, std::int64_t count, const std::int32_t* blocks);
  // Extends the entry to `count` tokens, the first of which it already has.
  void Grow(std::int32_t id, const std::int32_t* tokens, std::int64_t count);
  // Shortens the entry, which has no children, to its first `count` tokens (at least one, but not all). Returns a
  // sibling that now has the same tokens, so that one of the two must be removed, or kNoEntry.
  std::int32_t Shorten(std::int32_t id, std::int64_t count);
  void SetStored(std::int32_t id, StoreState state);
  std::int64_t num_stored() const { return num_stored_; }  // entries written or being written
  // Removes an entry without children.
  void Remove(std::int32_t id);
  // Changes whenever the entry's tokens or blocks change or its number is reused.
  std::uint32_t version(std::int32_t id) const { return versions_[id]; }

  // The entry in this physical block, or kNoEntry.
  std::int32_t EntryIn(std::int32_t block) const {
    return block < static_cast<std::int64_t>(entries_in_.size()) ? entries_in_[block] : kNoEntry;
  }
  // The contents of a physical block have moved to another one.
  void ReplaceBlock(std::int32_t from, std::int32_t to);

  // Appends to `path` the entries of the full blocks with which `tokens` continue an entry or a root.
  void Walk(std::int32_t from, const std::int32_t* tokens, std::int64_t count, std::vector<std::int32_t>* path) const;
  // The child that shares the most leading tokens with `key`, and their number; kNoEntry and 0 if none shares any.
  // Among equals, prefers one that ends there, then the first.
  std::int32_t Nearest(std::int32_t parent, const std::int32_t* key, std::int64_t count, std::int64_t* common) const;
  // A child that begins with these tokens (at most one block), or kNoEntry.
  std::int32_t Covering(std::int32_t parent, const std::int32_t* key, std::int64_t count) const;
  // A child in the same blocks that has fewer of these tokens and no others; or kNoEntry. Too slow to call for every
  // stored block, because it searches for each number of tokens.
  std::int32_t Shorter(std::int32_t parent, const std::int32_t* key, std::int64_t count,
                       const std::int32_t* blocks) const;

 private:
  static constexpr int kChunkBits = 9, kChunkMask = (1 << kChunkBits) - 1;
  struct Bucket {
    std::uint32_t tag;
    std::int32_t id;
  };

  std::int32_t* Row(std::int32_t id) const {
    return rows_[id >> kChunkBits].get() + (id & kChunkMask) * (block_tokens_ + ranges_);
  }
  std::int32_t NewId();
  void NoteEntryIn(std::int32_t block, std::int32_t id);
  // The position of the first child whose tokens do not sort before `key`.
  std::size_t LowerBound(const std::vector<std::int32_t>& children, const std::int32_t* key, std::int64_t count) const;
  void Link(std::int32_t id);
  void Unlink(std::int32_t id);

  // Hash table of full blocks: open addressing with linear probing.
  std::size_t Home(std::uint64_t hash) const { return hash & (buckets_.size() - 1); }
  static std::uint32_t Tag(std::uint64_t hash) { return hash >> 32; }
  bool Same(std::int32_t id, std::int32_t parent, const std::int32_t* tokens) const;
  // The full child of `parent` with these tokens; `hash` is the hash of its prefix.
  std::int32_t Lookup(std::uint64_t hash, std::int32_t parent, const std::int32_t* tokens) const;
  void Insert(std::int32_t id);
  void Erase(std::int32_t id);

  const std::int64_t block_tokens_, ranges_;
  std::vector<std::unique_ptr<PrefixEntry[]>> entries_;  // in chunks, so that entries do not move when the tree grows
  std::vector<std::unique_ptr<std::int32_t[]>> rows_;    // per entry: its tokens, then its blocks
  std::vector<std::int32_t> unused_;                     // ids of removed entries
  std::vector<std::int32_t> entries_in_;                 // [physical blocks]
  std::vector<std::uint32_t> versions_;                  // [entries]; kept separately because rarely read
  std::int32_t num_ids_ = 0;
  std::vector<Bucket> buckets_ = std::vector<Bucket>(64, Bucket{0, kNoEntry});
  std::size_t num_whole_ = 0;
  std::int64_t num_entries_ = 0, num_tokens_ = 0, num_stored_ = 0;
  PrefixEvents events_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PREFIX_TREE_H_
