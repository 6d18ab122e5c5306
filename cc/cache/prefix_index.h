// PrefixIndex: which token sequences have their keys and values in memory, and in which blocks.
//
// A tree for each namespace whose edges are the tokens of logical blocks: whole ones, and partial ones at the leaves. A
// look-up matches whole blocks from the start and tokens in the last one. Hashes only find candidates: tokens decide.
// Tokens are any numbers. Content that has none, an image for instance, is found by what stands in its place: negative
// numbers that the caller derives from a hash of the content.
//
// An entry is one logical block of a stored sequence: its tokens, one physical block for each range of a slot, and its
// owner: the slot that wrote it and still maps it, or none. The index knows no slots' states and maps nothing: the
// caller counts a reference for each block that `Store` names, and drops those that a cut or an eviction names. No
// locks: supply's mapping mutex guards it, look-ups included.
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

// Where a look-up ended. `blocks` and `owners` are those of the entries that the match goes through, the last of which
// may be matched in part.
struct PrefixMatch {
  std::int64_t tokens = 0;
  std::vector<std::int32_t> blocks;  // [ceil(tokens / block_tokens), ranges]
  std::vector<std::int32_t> owners;  // [ceil(tokens / block_tokens)]; -1: none
  std::int64_t behind = 0;           // tokens of the last entry behind the match
  bool leaf = false;                 // no entry continues the last one
};

struct PrefixNumbers {
  std::int64_t entries = 0;  // logical blocks
  std::int64_t tokens = 0;
  std::int64_t evictions = 0;            // logical blocks evicted so far
  std::int64_t pinned = 0;               // entries that pins hold
  std::int64_t stored = 0;               // entries that a store has, or that are being written
  std::int64_t unwritten_evictions = 0;  // whole blocks evicted that no store had
};

// What a caller knows of a sequence: it will be asked for again, or not.
enum class PrefixHint { kRetain, kDrop };

struct PinOptions {
  // Pins hold at most as many entries in all: a pin that would pass it holds the first tokens only.
  std::int64_t most_entries = std::numeric_limits<std::int64_t>::max();
  // When the pin ends without Unpin, on the clock of ExpirePins.
  double expires = std::numeric_limits<double>::infinity();
};

class PrefixIndex {
 public:
  PrefixIndex(std::int64_t block_tokens, std::int64_t ranges, PrefixPolicy policy = PrefixPolicy::kFrequency);
  ~PrefixIndex();

  // The number of a namespace, made when it is new.
  std::int32_t Namespace(const std::string& name);
  // The names of all namespaces, by number.
  std::vector<std::string> Namespaces() const;

  // The longest prefix of `tokens` in a namespace. Among entries that match equally far, the one that ends there.
  PrefixMatch Find(std::int32_t space, const std::int32_t* tokens, std::int64_t count) const;
  // A request asked for `tokens` (hit or not): what eviction remembers of recency and frequency. To be called once a
  // request. An entry of which less than half matches does not count. `taken`: the first tokens, which the request got
  // from memory. Returns how many of these were fetched and are taken for the first time since.
  std::int64_t Touch(std::int32_t space, const std::int32_t* tokens, std::int64_t count, std::int64_t taken = 0);

  // A slot holds `count` tokens, in the blocks of `map` ([logical blocks, ranges]). Called again with more tokens as
  // its sequence grows; the first tokens stay the same. Blocks whose tokens the index has already are not stored again.
  // Entries without an owner become the slot's where they have its blocks, from logical block `own_from` on: it may
  // write those. Appends the physical blocks that the index refers to from now on. An entry that has fewer of the
  // tokens in a block that is cached already goes (`dropped`, as for Cut): a block has one entry.
  using IsCached = std::function<bool(std::int32_t block)>;
  void Store(std::int32_t slot, std::int32_t space, const std::int32_t* tokens, std::int64_t count,
             const std::int32_t* map, std::vector<std::int32_t>* referenced,
             std::int64_t own_from = std::numeric_limits<std::int64_t>::max(), const IsCached& is_cached = nullptr,
             std::vector<std::int32_t>* dropped = nullptr);
  // Blocks that no slot maps hold the tokens of `count` logical blocks from `first_block` on ([count, ranges]), whole
  // ones. The sequence has entries before them, and none there. As for Store, the index refers to the blocks from now
  // on. `fetched`: they come from the store below the pool.
  void Add(std::int32_t space, const std::int32_t* tokens, std::int64_t first_block, std::int64_t count,
           const std::int32_t* blocks, bool fetched = false);
  // Whether an entry for this logical block is the slot's.
  bool Owns(std::int32_t slot, std::int64_t block) const;
  // Tokens of a slot as the index has them; 0: it has no sequence. Fewer than were stored when entries that they go
  // through have been evicted or cut: Store puts them in again, in the slot's blocks.
  std::int64_t Tokens(std::int32_t slot) const;
  // The slot is to write again from `tokens` on. Entries that it owns there go, with all that continues them, and an
  // entry that the cut goes through keeps its first tokens. Entries of logical blocks below `keep_blocks` stay whole,
  // without an owner: other slots map them. First tokens that are another entry too are dropped with the rest. Appends
  // the blocks to which the index no longer refers.
  void Cut(std::int32_t slot, std::int64_t tokens, std::int64_t keep_blocks, std::vector<std::int32_t>* dropped);
  // The slot no longer maps its sequence. Its entries stay, without an owner.
  void Detach(std::int32_t slot);

  // ---- eviction: the least valuable entries first, leaves before what they continue ----
  struct Eviction {
    std::int64_t entry = 0;
  };
  // How many physical blocks come free when the index drops these ([ranges], of an entry with this owner); -1: the
  // entry must stay, because a live slot maps it.
  using Freed = std::function<std::int64_t(const std::int32_t* blocks, std::int32_t owner)>;
  // Chooses entries until `enough` physical blocks come free, or all that can go; entries that free none only where
  // they continue one that does. `freed`: how many come free.
  std::vector<Eviction> PlanEviction(std::int64_t enough, const Freed& count, std::int64_t* freed) const;
  // Removes them; what has been planned is valid until the next change. Appends the blocks that are dropped.
  void Evict(const std::vector<Eviction>& plan, std::vector<std::int32_t>* dropped);
  // kDrop: the entries of `tokens` are evicted before others, back to the last one that something else continues,
  // unless a later request asks for them. kRetain: they count as touched now, and stay longer than what is touched
  // once.
  void Hint(std::int32_t space, const std::int32_t* tokens, std::int64_t count, PrefixHint hint);
  // Pinned entries are not evicted. A pin holds the entries that `tokens` go through now; entries that a cut removes
  // are no longer held. Pins of the same tokens are counted, and hold what they go through when the last is made.
  // Returns how many of the tokens are found and pinned.
  std::int64_t Pin(std::int32_t space, const std::int32_t* tokens, std::int64_t count, const PinOptions& options = {});
  // Takes one pin of the same tokens away, the one that expires first; does nothing if there is none.
  void Unpin(std::int32_t space, const std::int32_t* tokens, std::int64_t count);
  // Takes away the pins that expire at `now` or before, in seconds of any clock.
  void ExpirePins(double now);

  // ---- what a store below memory has: those entries are evicted before others ----
  struct Unwritten {
    std::int32_t space = 0;
    std::vector<std::int32_t> tokens;  // from the beginning of the sequence to the end of the last block
    std::int64_t first_block = 0;
    bool behind_writes = false;  // what comes before the first block is being written
  };
  // Whether nobody uses an entry, whose blocks ([ranges]) and owner these are.
  using Unused = std::function<bool(const std::int32_t* blocks, std::int32_t owner)>;
  // Whole blocks, at most `most`, on the way to the entry that would be evicted next of those that are unused and not
  // written, from the first block on that is not written. They count as being written. False: there are none.
  bool StartWrite(std::int64_t most, const Unused& unused, Unwritten* out);
  // Identity and version of an index entry, for Unchanged.
  struct EntryMark {
    std::int32_t entry = -1;
    std::uint32_t version = 0;
  };
  // The full blocks of a sequence from `first_block` on that are cached here.
  struct Stretch {
    std::vector<std::int32_t> blocks;  // [count, ranges]
    std::vector<std::int32_t> owners;  // [count]
    std::vector<EntryMark> marks;      // [count]
  };
  Stretch FindWhole(std::int32_t space, const std::int32_t* tokens, std::int64_t count, std::int64_t first_block) const;
  // Whether the entry has existed since the mark, with the same tokens in the same blocks.
  bool Unchanged(const EntryMark& mark) const;
  // Blocks from `first_block` on are written, or could not be; what has been removed since does not count.
  void EndWrite(std::int32_t space, const std::int32_t* tokens, std::int64_t count, std::int64_t first_block, bool ok);
  // The store no longer has the blocks from `first_block` on. They are written again once a request asks for them: not
  // at once, or a store that is too small would be written over and over.
  void LoseWritten(std::int32_t space, const std::int32_t* tokens, std::int64_t count, std::int64_t first_block);

  // ---- events ----
  // Records up to `most` events; 0 (as in the beginning): none.
  void RecordEvents(std::int64_t most);
  bool recording() const;
  // What happened since the last call. After RecordEvents, and when more happened than is recorded: kCleared, then all
  // whole blocks as kStored, parents before what continues them.
  std::vector<PrefixEvent> TakeEvents();

  // Visits all entries, parents before what continues them: an entry's namespace, its number, its parent's (one that
  // was not visited: a namespace) and its tokens.
  using Visit = std::function<void(std::int32_t space, std::int32_t entry, std::int32_t parent,
                                   const std::int32_t* tokens, std::int64_t count)>;
  void ForEach(const Visit& visit) const;
  // Where an entry is: its physical blocks, [ranges], and which logical block of a sequence it is.
  struct Place {
    const std::int32_t* blocks = nullptr;
    std::int64_t logical = 0;
  };
  Place PlaceOf(std::int32_t entry) const;
  // Whether an entry is in a physical block; its contents are in another one now.
  bool IsIn(std::int32_t block) const;
  void ReplaceBlock(std::int32_t from, std::int32_t to);
  PrefixNumbers numbers() const;

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PREFIX_INDEX_H_
