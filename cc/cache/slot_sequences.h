// SlotSequences: the sequences of slots in the prefix tree: storing, cutting and detaching them, and removing entries,
// which shortens the sequences through them.
#ifndef KVPAGE_CACHE_SLOT_SEQUENCES_H_
#define KVPAGE_CACHE_SLOT_SEQUENCES_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "cache/eviction_order.h"
#include "cache/prefix_pins.h"
#include "cache/prefix_tree.h"

namespace kvpage {

class SlotSequences {
 public:
  SlotSequences(PrefixTree* tree, EvictionOrder* order, PrefixPins* pins)
      : tree_(*tree), order_(*order), pins_(*pins) {}

  using IsCached = std::function<bool(std::int32_t block)>;

  // As in PrefixIndex; `root` is the namespace's root.
  void Store(std::int32_t slot, std::int32_t root, const std::int32_t* tokens, std::int64_t count,
             const std::int32_t* map, std::int64_t own_from, const IsCached& is_cached,
             std::vector<std::int32_t>* referenced, std::vector<std::int32_t>* dropped);
  void Add(std::int32_t root, const std::int32_t* tokens, std::int64_t first_block, std::int64_t count,
           const std::int32_t* blocks, bool fetched);
  std::int64_t Tokens(std::int32_t slot) const { return Known(slot) ? sequences_[slot].tokens : 0; }
  bool Owns(std::int32_t slot, std::int64_t block) const;
  void Cut(std::int32_t slot, std::int64_t tokens, std::int64_t keep_blocks, std::vector<std::int32_t>* dropped);
  void Detach(std::int32_t slot);
  // Removes an entry and everything that continues it. Appends their blocks.
  void Remove(std::int32_t id, std::vector<std::int32_t>* dropped);

 private:
  // A slot's sequence in the tree: the path of entries that ends at `tip`. The slot owns some of these entries.
  struct Sequence {
    std::int32_t tip = kNoEntry;  // the entry with the last token, or a root if there is none; kNoEntry: no sequence
    std::int64_t tokens = 0;
    std::int32_t before = -1, after = -1;  // neighbours among the slots with this tip
    // The entries that the slot owns, at most one per logical block, by depth. The last one may be outside of the path,
    // if the slot wrote the first tokens of a block of which another entry has more.
    std::vector<std::int32_t> owned;
  };

  bool Known(std::int32_t slot) const { return slot < static_cast<std::int64_t>(sequences_.size()); }
  void SetTip(std::int32_t slot, std::int32_t tip);
  // Makes the sequences that end at entry `from` end at entry `to`, and at position `end` at the latest. If a slot owns
  // an entry outside of the path, its sequence keeps that entry's tokens.
  void MoveTips(std::int32_t from, std::int32_t to, std::int64_t end);
  void Disown(std::int32_t id);
  // The slot becomes the owner of an entry without an owner if the entry has the slot's blocks, [ranges].
  void OwnAgain(std::int32_t slot, std::int32_t id, const std::int32_t* blocks);
  // Shortens an entry to the first `tokens` tokens of its sequence and removes everything that continues it.
  void Shorten(std::int32_t id, std::int64_t tokens, std::vector<std::int32_t>* dropped);

  PrefixTree& tree_;
  EvictionOrder& order_;
  PrefixPins& pins_;
  std::vector<Sequence> sequences_;  // by slot
  std::vector<std::int32_t> path_;   // of the latest Store
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_SLOT_SEQUENCES_H_
