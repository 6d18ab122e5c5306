// PrefixTree: the entries of the prefix index and how tokens find them.
//
// An entry is one logical block behind its parent, the entry of the block before it (or the root of a namespace). Whole
// blocks are found by the hash of the prefix that ends with them: the blocks of a prompt are looked up ahead of each
// other, so that a walk does not wait for memory once a block. Where no whole block continues a match, the parent's
// children, which are kept in the order of their tokens, show the one that goes furthest. Tokens decide everywhere.
// Bookkeeping only: the index (prefix_index.h) decides what is stored and removed.
#ifndef KVPAGE_CACHE_PREFIX_TREE_H_
#define KVPAGE_CACHE_PREFIX_TREE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "cache/prefix_events.h"

namespace kvpage {

constexpr std::int32_t kNoEntry = -1;

// What the store below the pool has of an entry, as far as the index knows.
enum class StoreState : std::int8_t {
  kUnwritten = 0,
  kWriting,
  kWritten,
  kFailed,  // not tried again before something continues it
  kLost,    // the store had it; not written again before a request asks for it
};

struct alignas(64) PrefixEntry {   // a cache line
  std::uint64_t hash = 0;          // of the prefix that ends with this block, once it is whole
  std::int32_t parent = kNoEntry;  // kNoEntry: a root
  std::int32_t depth = -1;         // the logical block's index; -1: a root
  std::int32_t tokens = 0;         // 0: a root, or no entry
  std::int32_t owner = -1;         // the slot that wrote it and still maps it
  std::int32_t first_tip = -1;     // first of the slots whose sequence ends here (slot_sequences.h)
  std::int32_t pins = 0;           // pinned prefixes that go through it
  std::int32_t space = -1;         // the number of its namespace
  bool listed = false;             // among those that may be evicted next
  bool dropped = false;            // to be evicted before others (a hint)
  bool fetched = false;            // read from a store, and not asked for since
  StoreState stored = StoreState::kUnwritten;
  std::vector<std::int32_t> children;  // in the order of their tokens
};

class PrefixTree {
 public:
  PrefixTree(std::int64_t block_tokens, std::int64_t ranges) : block_tokens_(block_tokens), ranges_(ranges) {}

  PrefixEntry& entry(std::int32_t id) { return entries_[id >> kChunkBits][id & kChunkMask]; }
  const PrefixEntry& entry(std::int32_t id) const { return entries_[id >> kChunkBits][id & kChunkMask]; }
  const std::int32_t* tokens(std::int32_t id) const { return Row(id); }
  const std::int32_t* blocks(std::int32_t id) const { return Row(id) + block_tokens_; }
  // How many tokens there are before the entry's; less than 0 for a root.
  std::int64_t Begin(std::int32_t id) const { return entry(id).depth * block_tokens_; }
  bool Whole(std::int32_t id) const { return entry(id).tokens == block_tokens_; }
  std::int64_t num_entries() const { return num_entries_; }  // without roots
  std::int64_t num_tokens() const { return num_tokens_; }
  std::int64_t block_tokens() const { return block_tokens_; }
  std::int64_t ranges() const { return ranges_; }

  // What becomes or ceases to be a whole block is recorded here.
  PrefixEvents& events() { return events_; }
  PrefixEvent StoredEvent(std::int32_t id) const;

  std::int32_t AddRoot(std::uint64_t hash, std::int32_t space);
  // `tokens` continue `parent` and are no entry yet.
  std::int32_t Add(std::int32_t parent, const std::int32_t* tokens, std::int64_t count, const std::int32_t* blocks);
  // The entry goes on to `count` tokens in all, of which it has the first.
  void Grow(std::int32_t id, const std::int32_t* tokens, std::int64_t count);
  // The entry keeps its first `count` tokens (some, not all). It has no children. Returns the sibling that has the same
  // tokens, of which one is to be removed; kNoEntry: there is none.
  std::int32_t Shorten(std::int32_t id, std::int64_t count);
  void SetStored(std::int32_t id, StoreState state);
  std::int64_t num_stored() const { return num_stored_; }  // entries that are written or being written
  // Removes an entry without children.
  void Remove(std::int32_t id);
  // Changes whenever the entry's tokens or blocks change or its number is reused.
  std::uint32_t version(std::int32_t id) const { return versions_[id]; }

  // The entry in this physical block, or kNoEntry.
  std::int32_t EntryIn(std::int32_t block) const {
    return block < static_cast<std::int64_t>(entries_in_.size()) ? entries_in_[block] : kNoEntry;
  }
  // The contents of a physical block are in another one now.
  void ReplaceBlock(std::int32_t from, std::int32_t to);

  // The entries of the whole blocks with which `tokens` continue an entry or a root, appended to `path`.
  void Walk(std::int32_t from, const std::int32_t* tokens, std::int64_t count, std::vector<std::int32_t>* path) const;
  // The child that has most of the first tokens of `key` in common, and how many: at least one, or kNoEntry and 0.
  // Among equals, one that ends there if there is one, else the first.
  std::int32_t Nearest(std::int32_t parent, const std::int32_t* key, std::int64_t count, std::int64_t* common) const;
  // A child that begins with these tokens (at most a block), or kNoEntry.
  std::int32_t Covering(std::int32_t parent, const std::int32_t* key, std::int64_t count) const;
  // A child that has fewer of these tokens, and no others, in these blocks; or kNoEntry. Not for every block stored: it
  // looks for each number of tokens.
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
  // The place of the first child whose tokens are not before `key`.
  std::size_t LowerBound(const std::vector<std::int32_t>& children, const std::int32_t* key, std::int64_t count) const;
  void Link(std::int32_t id);
  void Unlink(std::int32_t id);

  // The table of whole blocks: open addressing with linear probing.
  std::size_t Home(std::uint64_t hash) const { return hash & (buckets_.size() - 1); }
  static std::uint32_t Tag(std::uint64_t hash) { return hash >> 32; }
  bool Same(std::int32_t id, std::int32_t parent, const std::int32_t* tokens) const;
  // The whole child of `parent` with these tokens, whose prefix has this hash.
  std::int32_t Lookup(std::uint64_t hash, std::int32_t parent, const std::int32_t* tokens) const;
  void Insert(std::int32_t id);
  void Erase(std::int32_t id);

  const std::int64_t block_tokens_, ranges_;
  std::vector<std::unique_ptr<PrefixEntry[]>> entries_;  // chunks, so that nothing moves when the tree grows
  std::vector<std::unique_ptr<std::int32_t[]>> rows_;    // of an entry: its tokens, then its blocks
  std::vector<std::int32_t> unused_;                     // ids of entries that were removed
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
