#include "cache/slot_sequences.h"

#include <algorithm>

namespace kvpage {

void SlotSequences::SetTip(std::int32_t slot, std::int32_t tip) {
  Sequence& sequence = sequences_[slot];
  if (sequence.tip == tip) return;
  if (sequence.tip != kNoEntry) {
    if (sequence.before >= 0) {
      sequences_[sequence.before].after = sequence.after;
    } else {
      tree_.entry(sequence.tip).first_tip = sequence.after;
    }
    if (sequence.after >= 0) sequences_[sequence.after].before = sequence.before;
  }
  sequence.tip = tip;
  sequence.before = sequence.after = -1;
  if (tip == kNoEntry) return;
  sequence.after = tree_.entry(tip).first_tip;
  if (sequence.after >= 0) sequences_[sequence.after].before = slot;
  tree_.entry(tip).first_tip = slot;
}

void SlotSequences::MoveTips(std::int32_t from, std::int32_t to, std::int64_t end) {
  for (std::int32_t slot = tree_.entry(from).first_tip, after; slot >= 0; slot = after) {
    Sequence& sequence = sequences_[slot];
    after = sequence.after;
    std::int32_t tip = to;
    sequence.tokens = std::min(sequence.tokens, end);
    if (!sequence.owned.empty()) {
      const std::int32_t own = sequence.owned.back();
      const std::int64_t own_end = tree_.Begin(own) + tree_.entry(own).tokens;
      if (own_end > sequence.tokens) {
        tip = own;
        sequence.tokens = own_end;
      }
    }
    SetTip(slot, tip);
  }
}

void SlotSequences::Disown(std::int32_t id) {
  PrefixEntry& entry = tree_.entry(id);
  if (entry.owner < 0) return;
  std::vector<std::int32_t>& owned = sequences_[entry.owner].owned;
  owned.erase(std::find(owned.rbegin(), owned.rend(), id).base() - 1);
  entry.owner = -1;
}

void SlotSequences::OwnAgain(std::int32_t slot, std::int32_t id, const std::int32_t* blocks) {
  PrefixEntry& entry = tree_.entry(id);
  std::vector<std::int32_t>& owned = sequences_[slot].owned;
  if (entry.owner >= 0 || !std::equal(blocks, blocks + tree_.ranges(), tree_.blocks(id))) return;
  if (!owned.empty() && tree_.entry(owned.back()).depth >= entry.depth) return;
  entry.owner = slot;
  owned.push_back(id);
}

bool SlotSequences::Owns(std::int32_t slot, std::int64_t block) const {
  if (!Known(slot)) return false;
  const std::vector<std::int32_t>& owned = sequences_[slot].owned;
  const auto at = std::lower_bound(owned.begin(), owned.end(), block,
                                   [&](std::int32_t id, std::int64_t depth) { return tree_.entry(id).depth < depth; });
  return at != owned.end() && tree_.entry(*at).depth == block;
}

void SlotSequences::Remove(std::int32_t id, std::vector<std::int32_t>* dropped) {
  const std::int32_t parent = tree_.entry(id).parent;
  const std::int64_t end = tree_.Begin(id);
  std::vector<std::int32_t> subtree = {id};
  for (std::size_t i = 0; i < subtree.size(); ++i) {
    const std::vector<std::int32_t>& children = tree_.entry(subtree[i]).children;
    subtree.insert(subtree.end(), children.begin(), children.end());
  }
  for (auto each = subtree.rbegin(); each != subtree.rend(); ++each) Disown(*each);
  for (auto each = subtree.rbegin(); each != subtree.rend(); ++each) {
    MoveTips(*each, parent, end);
    pins_.Retreat(*each);
    dropped->insert(dropped->end(), tree_.blocks(*each), tree_.blocks(*each) + tree_.ranges());
    order_.Leave(*each);
    order_.policy().OnRemoved(*each);
    tree_.Remove(*each);
  }
  order_.Update(parent);
}

void SlotSequences::Store(std::int32_t slot, std::int32_t root, const std::int32_t* tokens, std::int64_t count,
                          const std::int32_t* map, std::int64_t own_from, const IsCached& is_cached,
                          std::vector<std::int32_t>* referenced, std::vector<std::int32_t>* dropped) {
  if (!Known(slot)) sequences_.resize(slot + 1);
  Sequence& sequence = sequences_[slot];
  if (count <= sequence.tokens) return;
  if (sequence.tokens == 0) SetTip(slot, root);
  const std::int64_t block_tokens = tree_.block_tokens();
  std::int64_t block = sequence.tokens / block_tokens;
  std::int32_t at = sequence.tokens % block_tokens == 0 ? sequence.tip : tree_.entry(sequence.tip).parent;
  path_.clear();
  tree_.Walk(at, tokens + block * block_tokens, count - block * block_tokens, &path_);
  for (const std::int32_t id : path_) {
    if (block >= own_from) OwnAgain(slot, id, map + block * tree_.ranges());
    ++block;
  }
  if (!path_.empty()) at = path_.back();
  for (; block * block_tokens < count; ++block) {
    const std::int32_t* const key = tokens + block * block_tokens;
    const std::int64_t length = std::min(block_tokens, count - block * block_tokens);
    std::int32_t found = tree_.Covering(at, key, length);
    if (found == kNoEntry) {
      const std::int32_t* const blocks = map + block * tree_.ranges();
      const std::int32_t last = sequence.owned.empty() ? kNoEntry : sequence.owned.back();
      const bool has_own = last != kNoEntry && tree_.entry(last).depth == block;
      // A truncation may have replaced the blocks; the tokens that follow are not in the old ones.
      const bool moved = has_own && !std::equal(blocks, blocks + tree_.ranges(), tree_.blocks(last));
      if (moved) Disown(last);
      if (has_own && !moved) {
        found = last;
        tree_.Grow(found, key, length);
        order_.policy().OnResized(found);
      } else {
        // An entry with fewer of these tokens in the same block, for example one left there by another slot, is
        // removed.
        const std::int32_t shorter =
            is_cached != nullptr && is_cached(blocks[0]) ? tree_.Shorter(at, key, length, blocks) : kNoEntry;
        if (shorter != kNoEntry) Remove(shorter, dropped);
        order_.Leave(at);
        found = tree_.Add(at, key, length, blocks);
        tree_.entry(found).owner = slot;
        sequence.owned.push_back(found);
        order_.policy().Stored(found);
        referenced->insert(referenced->end(), tree_.blocks(found), tree_.blocks(found) + tree_.ranges());
      }
    }
    at = found;
  }
  order_.Update(at);
  SetTip(slot, at);
  sequence.tokens = count;
}

void SlotSequences::Add(std::int32_t root, const std::int32_t* tokens, std::int64_t first_block, std::int64_t count,
                        const std::int32_t* blocks, bool fetched) {
  const std::int64_t block_tokens = tree_.block_tokens();
  path_.clear();
  tree_.Walk(root, tokens, first_block * block_tokens, &path_);
  std::int32_t at = path_.empty() ? root : path_.back();
  for (std::int64_t i = 0; i < count; ++i) {
    order_.Leave(at);
    at = tree_.Add(at, tokens + (first_block + i) * block_tokens, block_tokens, blocks + i * tree_.ranges());
    tree_.entry(at).fetched = fetched;
    if (fetched) tree_.SetStored(at, StoreState::kWritten);
    order_.policy().Stored(at);
  }
  order_.Update(at);
}

void SlotSequences::Shorten(std::int32_t id, std::int64_t tokens, std::vector<std::int32_t>* dropped) {
  while (!tree_.entry(id).children.empty()) Remove(tree_.entry(id).children.back(), dropped);
  order_.Leave(id);
  const std::int32_t same = tree_.Shorten(id, tokens - tree_.Begin(id));
  if (same == kNoEntry) {
    MoveTips(id, id, tokens);
    order_.policy().OnResized(id);
    order_.Update(id);
  } else {
    Disown(id);
    MoveTips(id, same, tokens);
    Remove(id, dropped);
  }
}

void SlotSequences::Cut(std::int32_t slot, std::int64_t tokens, std::int64_t keep_blocks,
                        std::vector<std::int32_t>* dropped) {
  if (!Known(slot)) return;
  Sequence& sequence = sequences_[slot];
  while (!sequence.owned.empty()) {
    const std::int32_t own = sequence.owned.back();
    if (tree_.Begin(own) + tree_.entry(own).tokens <= tokens) break;
    if (tree_.entry(own).depth < keep_blocks) {
      Disown(own);
    } else if (tree_.Begin(own) >= tokens) {
      Remove(own, dropped);
    } else {
      Shorten(own, tokens, dropped);
    }
  }
  if (sequence.tokens <= tokens) return;
  std::int32_t tip = sequence.tip;
  while (tree_.entry(tip).depth >= 0 && tree_.Begin(tip) >= tokens) tip = tree_.entry(tip).parent;
  SetTip(slot, tip);
  sequence.tokens = tokens;
}

void SlotSequences::Detach(std::int32_t slot) {
  if (!Known(slot)) return;
  Sequence& sequence = sequences_[slot];
  for (const std::int32_t id : sequence.owned) tree_.entry(id).owner = -1;
  sequence.owned.clear();
  sequence.tokens = 0;
  SetTip(slot, kNoEntry);
}

}  // namespace kvpage
