// A plain model of the prefix index: a map from token sequences to entries, walked token by token.
#ifndef KVPAGE_TESTS_PREFIX_MODEL_H_
#define KVPAGE_TESTS_PREFIX_MODEL_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "cache/prefix_index.h"

namespace kvpage::testing {

using Tokens = std::vector<std::int32_t>;

class PrefixModel {
 public:
  struct Entry {
    std::int32_t owner;
    std::vector<std::int32_t> blocks;
    std::int64_t last;  // the last request that touched or stored it
  };
  using Key = std::pair<std::int32_t, Tokens>;  // namespace, all tokens up to the entry's end

  PrefixModel(std::int64_t block_tokens, std::int64_t ranges) : block_tokens_(block_tokens), ranges_(ranges) {}

  std::map<Key, Entry>& entries() { return entries_; }
  std::int64_t Depth(const Key& key) const {
    return (static_cast<std::int64_t>(key.second.size()) - 1) / block_tokens_;
  }

  // Returns the first entry that contains the last of the first `length` tokens and starts with them.
  const Key* Having(std::int32_t space, const Tokens& tokens, std::int64_t length) const {
    const Key key(space, Tokens(tokens.begin(), tokens.begin() + length));
    const auto place = entries_.lower_bound(key);
    for (auto next = place; next != entries_.end() && Begins(next->first, key); ++next) {
      if (Depth(next->first) == Depth(key)) return &next->first;
    }
    return nullptr;
  }
  std::int64_t Longest(std::int32_t space, const Tokens& tokens) const {
    std::int64_t length = 0;
    while (length < static_cast<std::int64_t>(tokens.size()) && Having(space, tokens, length + 1)) ++length;
    return length;
  }
  std::vector<Key> Path(std::int32_t space, const Tokens& tokens, std::int64_t length) const {
    std::vector<Key> path;
    for (std::int64_t end = block_tokens_; end < length; end += block_tokens_)
      path.push_back(*Having(space, tokens, end));
    if (length > 0) path.push_back(*Having(space, tokens, length));
    return path;
  }
  bool Leaf(const Key& key) const {
    const auto next = entries_.upper_bound(key);
    if (static_cast<std::int64_t>(key.second.size()) % block_tokens_ != 0) return true;
    return next == entries_.end() || !Begins(next->first, key);
  }
  PrefixMatch Find(std::int32_t space, const Tokens& tokens) const {
    PrefixMatch match;
    match.tokens = Longest(space, tokens);
    for (const Key& key : Path(space, tokens, match.tokens)) {
      const Entry& entry = entries_.at(key);
      match.blocks.insert(match.blocks.end(), entry.blocks.begin(), entry.blocks.end());
      match.owners.push_back(entry.owner);
      match.behind = static_cast<std::int64_t>(key.second.size()) - match.tokens;
      match.leaf = Leaf(key);
    }
    return match;
  }
  void Touch(std::int32_t space, const Tokens& tokens) {
    ++now_;
    const std::int64_t length = Longest(space, tokens);
    for (const Key& key : Path(space, tokens, length)) {
      const std::int64_t begin = Depth(key) * block_tokens_,
                         size = static_cast<std::int64_t>(key.second.size()) - begin;
      if (2 * (length - begin) >= size) entries_.at(key).last = now_;
    }
  }
  void Store(std::int32_t slot, std::int32_t space, const Tokens& tokens, const std::vector<std::int32_t>& map) {
    const std::int64_t count = static_cast<std::int64_t>(tokens.size());
    for (std::int64_t begin = 0; begin < count; begin += block_tokens_) {
      const std::int64_t end = std::min(count, begin + block_tokens_);
      if (Having(space, tokens, end)) continue;
      const auto blocks = map.begin() + begin / block_tokens_ * ranges_;
      Entry entry{slot, {blocks, blocks + ranges_}, now_};
      for (auto& [key, own] : entries_) {
        if (own.owner != slot || Depth(key) != begin / block_tokens_) continue;
        if (own.blocks != entry.blocks) {
          own.owner = -1;  // the slot has other blocks there by now
          break;
        }
        entry = own;
        entries_.erase(key);
        break;
      }
      entries_.emplace(Key(space, Tokens(tokens.begin(), tokens.begin() + end)), entry);
    }
  }
  void Cut(std::int32_t slot, std::int64_t tokens, std::int64_t keep_blocks) {
    std::vector<Key> own;
    for (const auto& [key, entry] : entries_) {
      if (entry.owner == slot && static_cast<std::int64_t>(key.second.size()) > tokens) own.push_back(key);
    }
    for (const Key& key : own) {
      const auto place = entries_.find(key);
      if (place == entries_.end()) continue;
      if (Depth(key) < keep_blocks) {
        place->second.owner = -1;
        continue;
      }
      const Entry entry = place->second;
      Remove(key);
      if (Depth(key) * block_tokens_ < tokens) {  // keeps its first tokens, unless they are an entry
        entries_.emplace(Key(key.first, Tokens(key.second.begin(), key.second.begin() + tokens)), entry);
      }
    }
  }
  void Detach(std::int32_t slot) {
    for (auto& [key, entry] : entries_) {
      if (entry.owner == slot) entry.owner = -1;
    }
  }
  // Removes an entry and all its continuations.
  void Remove(const Key& key) {
    const bool whole = static_cast<std::int64_t>(key.second.size()) % block_tokens_ == 0;
    auto next = entries_.erase(entries_.find(key));
    while (whole && next != entries_.end() && Begins(next->first, key)) next = entries_.erase(next);
  }
  std::multiset<std::int32_t> Blocks() const {
    std::multiset<std::int32_t> blocks;
    for (const auto& [key, entry] : entries_) blocks.insert(entry.blocks.begin(), entry.blocks.end());
    return blocks;
  }

 private:
  static bool Begins(const Key& longer, const Key& with) {
    return longer.first == with.first && longer.second.size() >= with.second.size() &&
           std::equal(with.second.begin(), with.second.end(), longer.second.begin());
  }

  const std::int64_t block_tokens_, ranges_;
  std::map<Key, Entry> entries_;
  std::int64_t now_ = 0;
};

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_PREFIX_MODEL_H_
