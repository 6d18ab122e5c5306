// PrefixIndex: the token sequences whose keys and values are in memory, and their blocks.
//
// Each namespace has a tree whose edges are the tokens of logical blocks: full blocks, and partial ones at the leaves.
// A lookup matches full blocks from the start, and then tokens in the last block. Hashes only find candidates; tokens
// are always compared. Tokens can be any numbers. Content without tokens, such as an image, is represented by negative
// numbers that the caller derives from a hash of the content.
//
// An entry is one logical block of a stored sequence: its tokens, one physical block for each range of a slot, and its
// owner, which is the slot that wrote it and still maps it, or none. The index does not know the states of slots and
// maps nothing: the caller counts a reference for each block that `Store` returns, and drops those that a cut or an
// eviction returns. No locks: supply's mapping mutex guards it, also for lookups.
#ifndef KVPAGE_CACHE_PREFIX_INDEX_H_
#define KVPAGE_CACHE_PREFIX_INDEX_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cache/prefix_events.h"
#include "cache/prefix_policy.h"

namespace kvpage {

// The result of a lookup. `blocks` and `owners` belong to the entries along the match, the last of which may match only
// partly.
struct PrefixMatch {
  std::int64_t tokens = 0;
  std::vector<std::int32_t> blocks;  // [ceil(tokens / block_tokens), ranges]
  std::vector<std::int32_t> owners;  // [ceil(tokens / block_tokens)]; -1: none
  std::int64_t behind = 0;           // tokens of the last entry after the match
  bool leaf = false;                 // no entry continues the last one
};

struct PrefixNumbers {
  std::int64_t entries = 0;  // logical blocks
  std::int64_t tokens = 0;
  std::int64_t evictions = 0;            // total number of logical blocks evicted
  std::int64_t pinned = 0;               // entries held by pins
  std::int64_t stored = 0;               // entries that are in a store or being written to it
  std::int64_t unwritten_evictions = 0;  // total number of full blocks evicted that were in no store
};

// A caller's hint about a sequence: it will be requested again, or not.
enum class PrefixHint { kRetain, kDrop };

struct PinOptions {
  // At most this many entries are pinned in total; a pin that would exceed this holds only the first tokens.
  std::int64_t most_entries = std::numeric_limits<std::int64_t>::max();
  // When the pin expires, on the clock of ExpirePins.
  double expires = std::numeric_limits<double>::infinity();
};

class PrefixIndex {
 public:
  PrefixIndex(std::int64_t block_tokens, std::int64_t ranges, PrefixPolicy policy = PrefixPolicy::kFrequency);
  ~PrefixIndex();

  // The number of a namespace, which is created if it is new.
  std::int32_t Namespace(const std::string& name);
  // The names of all namespaces, by number.
  std::vector<std::string> Namespaces() const;

  // The longest prefix of `tokens` in a namespace. If several entries match equally far, prefers one that ends there.
  PrefixMatch Find(std::int32_t space, const std::int32_t* tokens, std::int64_t count) const;
  // Records that a request asked for `tokens`, found or not, so that eviction knows about recency and frequency. Call
  // this once per request. An entry counts only if at least half of it matches. `taken`: number of first tokens that
  // the request got from memory. Returns how many of these were fetched from a store and taken for the first time
  // since.
  std::int64_t Touch(std::int32_t space, const std::int32_t* tokens, std::int64_t count, std::int64_t taken = 0);

  // Records that a slot holds `count` tokens in the blocks of `map` ([logical blocks, ranges]). Called again with more
  // tokens as its sequence grows; the first tokens stay the same. Blocks whose tokens are already in the index are not
  // stored again. From logical block `own_from` on, entries without an owner that have the slot's blocks become the
  // slot's, which may write them. Appends to `referenced` the physical blocks to which the index refers from now on. If
  // a block is already cached for an entry with fewer of the same tokens, that entry is removed (`dropped`, as for
  // Cut), because a block has only one entry.
  using IsCached = std::function<bool(std::int32_t block)>;
  void Store(std::int32_t slot, std::int32_t space, const std::int32_t* tokens, std::int64_t count,
             const std::int32_t* map, std::vector<std::int32_t>* referenced,
             std::int64_t own_from = std::numeric_limits<std::int64_t>::max(), const IsCached& is_cached = nullptr,
             std::vector<std::int32_t>* dropped = nullptr);
  // Adds `count` full logical blocks of a sequence from `first_block` on, which are in blocks ([count, ranges]) that no
  // slot maps. The sequence must have entries before them and none there. As for Store, the index refers to the blocks
  // from now on. `fetched`: they were read from the pool's store.
  void Add(std::int32_t space, const std::int32_t* tokens, std::int64_t first_block, std::int64_t count,
           const std::int32_t* blocks, bool fetched = false);
  // Whether the slot owns an entry for this logical block.
  bool Owns(std::int32_t slot, std::int64_t block) const;
  // Number of tokens of a slot that are in the index; 0 if it has no sequence. There can be fewer than were stored,
  // because entries have been evicted or cut; Store adds them again, in the slot's blocks.
  std::int64_t Tokens(std::int32_t slot) const;
  // Called before the slot writes again from `tokens` on. Removes entries that it owns there, with everything that
  // continues them; an entry that contains the cut keeps its first tokens. Entries of logical blocks below
  // `keep_blocks` are kept without an owner, because other slots map them. If the remaining first tokens equal another
  // entry, they are removed too. Appends the blocks to which the index no longer refers.
  void Cut(std::int32_t slot, std::int64_t tokens, std::int64_t keep_blocks, std::vector<std::int32_t>* dropped);
  // Called when the slot no longer maps its sequence. Its entries stay, without an owner.
  void Detach(std::int32_t slot);

  // ---- eviction: the least valuable entries first, leaves before what they continue ----
  struct Eviction {
    std::int64_t entry = 0;
  };
  // Returns how many physical blocks ([ranges], of an entry with this owner) become free when the index drops them; -1
  // if the entry must stay because a live slot maps it.
  using Freed = std::function<std::int64_t(const std::int32_t* blocks, std::int32_t owner)>;
  // Chooses entries until `enough` physical blocks become free, or all that can be evicted. Entries that free no block
  // are only chosen if they continue one that does. `freed`: number of blocks that become free.
  std::vector<Eviction> PlanEviction(std::int64_t enough, const Freed& count, std::int64_t* freed) const;
  // Removes the planned entries; a plan is valid until the next change. Appends the blocks that are dropped.
  void Evict(const std::vector<Eviction>& plan, std::vector<std::int32_t>* dropped);
  // kDrop: the entries of `tokens`, back to the last one that something else continues, are evicted before others,
  // unless a later request asks for them. kRetain: they count as touched now, and stay longer than entries touched
  // once.
  void Hint(std::int32_t space, const std::int32_t* tokens, std::int64_t count, PrefixHint hint);
  // Pins the entries that `tokens` go through now; pinned entries are not evicted. Entries that a cut removes are no
  // longer held. Pins of the same tokens are counted, and hold the entries found by the latest of them. Returns how
  // many of the tokens were found and pinned.
  std::int64_t Pin(std::int32_t space, const std::int32_t* tokens, std::int64_t count, const PinOptions& options = {});
  // Removes one pin of the same tokens, the one that expires first; does nothing if there is none.
  void Unpin(std::int32_t space, const std::int32_t* tokens, std::int64_t count);
  // Removes the pins that expire at or before `now`, in seconds on any clock.
  void ExpirePins(double now);

  // ---- contents of the store: entries that are in it are evicted before others ----
  struct Unwritten {
    std::int32_t space = 0;
    std::vector<std::int32_t> tokens;  // from the beginning of the sequence to the end of the last block
    std::int64_t first_block = 0;
    bool behind_writes = false;  // the blocks before the first one are being written
  };
  // Whether nobody uses an entry with these blocks ([ranges]) and this owner.
  using Unused = std::function<bool(const std::int32_t* blocks, std::int32_t owner)>;
  // Finds the entry that is next to be evicted among those that are unused and not written. Returns at most `most` full
  // blocks on the path to it, starting at the first one that is not written, and marks them as being written. Returns
  // false if there are none.
  bool StartWrite(std::int64_t most, const Unused& unused, Unwritten* out);
  // Identity and version of an index entry, for Unchanged.
  struct EntryMark {
    std::int32_t entry = -1;
    std::uint32_t version = 0;
  };
  // The full blocks of a sequence from `first_block` on that are in the index.
  struct Stretch {
    std::vector<std::int32_t> blocks;  // [count, ranges]
    std::vector<std::int32_t> owners;  // [count]
    std::vector<EntryMark> marks;      // [count]
  };
  Stretch FindWhole(std::int32_t space, const std::int32_t* tokens, std::int64_t count, std::int64_t first_block) const;
  // Whether the entry still exists, with the same tokens in the same blocks as when it was marked.
  bool Unchanged(const EntryMark& mark) const;
  // Blocks from `first_block` on have been written, or could not be. Entries removed since then are ignored.
  void EndWrite(std::int32_t space, const std::int32_t* tokens, std::int64_t count, std::int64_t first_block, bool ok);
  // The store no longer has the blocks from `first_block` on. They are written again only after a request has asked for
  // them; otherwise a store that is too small would be rewritten over and over.
  void LoseWritten(std::int32_t space, const std::int32_t* tokens, std::int64_t count, std::int64_t first_block);

  // ---- events ----
  // Records up to `most` events; 0, which is the initial setting, records none.
  void RecordEvents(std::int64_t most);
  bool recording() const;
  // Returns the events since the last call. After RecordEvents, or if the record overflowed: kCleared, followed by all
  // full blocks as kStored, parents first.
  std::vector<PrefixEvent> TakeEvents();

  // Visits all entries, parents first, with the entry's namespace, its number, its parent's number (an entry that was
  // not visited stands for the namespace) and its tokens.
  using Visit = std::function<void(std::int32_t space, std::int32_t entry, std::int32_t parent,
                                   const std::int32_t* tokens, std::int64_t count)>;
  void ForEach(const Visit& visit) const;
  // The location of an entry: its physical blocks, [ranges], and the index of its logical block in the sequence.
  struct Place {
    const std::int32_t* blocks = nullptr;
    std::int64_t logical = 0;
  };
  Place PlaceOf(std::int32_t entry) const;
  // Whether an entry is in a physical block; moves entries when the contents of a block have moved to another one.
  bool IsIn(std::int32_t block) const;
  void ReplaceBlock(std::int32_t from, std::int32_t to);
  PrefixNumbers numbers() const;

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PREFIX_INDEX_H_
