// PrefixPins: the prefixes that callers have pinned, and the number of pins through each entry of the tree.
//
// A pin holds the entries that its tokens went through when they were last pinned. Pins of the same tokens are counted,
// so tokens pinned twice must be unpinned twice. The caller provides the clock.
#ifndef KVPAGE_CACHE_PREFIX_PINS_H_
#define KVPAGE_CACHE_PREFIX_PINS_H_

#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "cache/prefix_tree.h"

namespace kvpage {

class PrefixPins {
 public:
  explicit PrefixPins(PrefixTree* tree) : tree_(*tree) {}

  // Pins the entries of `path`, which `tokens` go through, up to a total of `most` pinned entries. `expires`: when the
  // pin ends without Remove. Returns how many entries of the path are pinned. `end_before`: the entry at which earlier
  // pins of these tokens ended, or kNoEntry if there were none.
  std::size_t Add(std::int32_t space, const std::int32_t* tokens, std::int64_t count,
                  const std::vector<std::int32_t>& path, std::int64_t most, double expires, std::int32_t* end_before);
  // Removes one pin of these tokens, the one that expires first. Returns the entry at its end, or kNoEntry.
  std::int32_t Remove(std::int32_t space, const std::int32_t* tokens, std::int64_t count);
  // Removes expired pins. Returns the entries at their ends.
  std::vector<std::int32_t> Expire(double now);
  // Called before the entry is removed: its pins then end at its parent.
  void Retreat(std::int32_t id);

  std::int64_t num_pinned() const { return num_pinned_; }  // entries

 private:
  using Key = std::pair<std::int32_t, std::vector<std::int32_t>>;  // namespace, tokens
  struct Record {
    std::int32_t entry;             // the last pinned entry; may be a root
    std::multiset<double> expires;  // one per pin
  };

  // Adds to the pins of the entries from `id` up to, not including, `end`.
  void Count(std::int32_t id, std::int32_t end, std::int32_t difference);
  std::int32_t TakeFirst(std::map<Key, Record>::iterator place);

  PrefixTree& tree_;
  std::map<Key, Record> records_;
  std::int64_t num_pinned_ = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PREFIX_PINS_H_
