#include "cache/prefix_index.h"

#include <algorithm>
#include <unordered_map>

#include "cache/eviction_order.h"
#include "cache/prefix_pins.h"
#include "cache/prefix_tree.h"
#include "cache/token_hash.h"

namespace kvpage {

// What a slot's sequence is in the tree: the path of entries that ends at `tip`. Some of them are the slot's.
struct Sequence {
  std::int32_t tip = kNoEntry;  // the entry with its last token, a root when there is none; kNoEntry: no sequence
  std::int64_t tokens = 0;
  std::int32_t before = -1, after = -1;  // neighbours among the slots with this tip
  // The slot's own entries, at most one for a logical block, by depth. The last one may lie beside the path: the slot
  // wrote the first tokens of a block of which another entry has more.
  std::vector<std::int32_t> owned;
};

struct PrefixIndex::Impl {
  Impl(std::int64_t block_tokens, std::int64_t ranges, PrefixPolicy policy)
      : tree(block_tokens, ranges), order(&tree, MakePolicy(policy, tree)), pins(&tree) {}

  // The entries that `tokens` go through, into `path`; the last one may be matched in part. Returns the tokens matched.
  std::int64_t Match(std::int32_t space, const std::int32_t* tokens, std::int64_t count);
  void SetTip(std::int32_t slot, std::int32_t tip);
  // The sequences that end at an entry end at another one now, at the latest at `end`. Those that have an entry of
  // their own beside their path keep its tokens.
  void MoveTips(std::int32_t from, std::int32_t to, std::int64_t end);
  void Disown(std::int32_t id);
  // Removes an entry and all that continues it.
  void Remove(std::int32_t id, std::vector<std::int32_t>* dropped);
  void Cut(std::int32_t slot, std::int64_t tokens, std::int64_t keep_blocks, std::vector<std::int32_t>* dropped);

  std::int64_t Begin(std::int32_t id) const { return tree.entry(id).depth * tree.block_tokens(); }

  PrefixTree tree;
  EvictionOrder order;
  PrefixPins pins;
  std::unordered_map<std::string, std::int32_t> spaces;
  std::vector<std::int32_t> roots;
  std::vector<Sequence> sequences;  // by slot
  std::vector<std::int32_t> path;   // of the last Match
  std::int64_t evictions = 0;
};

std::int64_t PrefixIndex::Impl::Match(std::int32_t space, const std::int32_t* tokens, std::int64_t count) {
  path.clear();
  tree.Walk(roots[space], tokens, count, &path);
  const std::int64_t whole = static_cast<std::int64_t>(path.size()) * tree.block_tokens();
  if (whole == count) return whole;
  std::int64_t common;
  const std::int32_t last = tree.Nearest(path.empty() ? roots[space] : path.back(), tokens + whole,
                                         std::min(count - whole, tree.block_tokens()), &common);
  if (last != kNoEntry) path.push_back(last);
  return whole + common;
}

void PrefixIndex::Impl::SetTip(std::int32_t slot, std::int32_t tip) {
  Sequence& sequence = sequences[slot];
  if (sequence.tip == tip) return;
  if (sequence.tip != kNoEntry) {
    if (sequence.before >= 0) {
      sequences[sequence.before].after = sequence.after;
    } else {
      tree.entry(sequence.tip).first_tip = sequence.after;
    }
    if (sequence.after >= 0) sequences[sequence.after].before = sequence.before;
  }
  sequence.tip = tip;
  sequence.before = sequence.after = -1;
  if (tip == kNoEntry) return;
  sequence.after = tree.entry(tip).first_tip;
  if (sequence.after >= 0) sequences[sequence.after].before = slot;
  tree.entry(tip).first_tip = slot;
}

void PrefixIndex::Impl::MoveTips(std::int32_t from, std::int32_t to, std::int64_t end) {
  for (std::int32_t slot = tree.entry(from).first_tip, after; slot >= 0; slot = after) {
    Sequence& sequence = sequences[slot];
    after = sequence.after;
    std::int32_t tip = to;
    sequence.tokens = std::min(sequence.tokens, end);
    if (!sequence.owned.empty()) {
      const std::int32_t own = sequence.owned.back();
      const std::int64_t own_end = Begin(own) + tree.entry(own).tokens;
      if (own_end > sequence.tokens) {
        tip = own;
        sequence.tokens = own_end;
      }
    }
    SetTip(slot, tip);
  }
}

void PrefixIndex::Impl::Disown(std::int32_t id) {
  PrefixEntry& entry = tree.entry(id);
  if (entry.owner < 0) return;
  std::vector<std::int32_t>& owned = sequences[entry.owner].owned;
  owned.erase(std::find(owned.rbegin(), owned.rend(), id).base() - 1);
  entry.owner = -1;
}

void PrefixIndex::Impl::Remove(std::int32_t id, std::vector<std::int32_t>* dropped) {
  const std::int32_t parent = tree.entry(id).parent;
  const std::int64_t end = Begin(id);
  std::vector<std::int32_t> subtree = {id};
  for (std::size_t i = 0; i < subtree.size(); ++i) {
    const std::vector<std::int32_t>& children = tree.entry(subtree[i]).children;
    subtree.insert(subtree.end(), children.begin(), children.end());
  }
  for (auto each = subtree.rbegin(); each != subtree.rend(); ++each) Disown(*each);
  for (auto each = subtree.rbegin(); each != subtree.rend(); ++each) {
    MoveTips(*each, parent, end);
    pins.Retreat(*each);
    dropped->insert(dropped->end(), tree.blocks(*each), tree.blocks(*each) + tree.ranges());
    order.Leave(*each);
    order.policy().OnRemoved(*each);
    tree.Remove(*each);
  }
  order.Update(parent);
}

PrefixIndex::PrefixIndex(std::int64_t block_tokens, std::int64_t ranges, PrefixPolicy policy)
    : impl_(std::make_unique<Impl>(block_tokens, ranges, policy)) {}
PrefixIndex::~PrefixIndex() = default;

std::int32_t PrefixIndex::Namespace(const std::string& name) {
  const std::int32_t next = static_cast<std::int32_t>(impl_->roots.size());
  const auto [place, added] = impl_->spaces.emplace(name, next);
  if (added) impl_->roots.push_back(impl_->tree.AddRoot(HashName(name), next));
  return place->second;
}

PrefixMatch PrefixIndex::Find(std::int32_t space, const std::int32_t* tokens, std::int64_t count) const {
  const PrefixTree& tree = impl_->tree;
  PrefixMatch match;
  match.tokens = impl_->Match(space, tokens, count);
  const std::vector<std::int32_t>& path = impl_->path;
  if (path.empty()) return match;
  match.owners.resize(path.size());
  match.blocks.resize(path.size() * tree.ranges());
  std::int32_t* blocks = match.blocks.data();
  for (std::size_t i = 0; i < path.size(); ++i) {
    match.owners[i] = tree.entry(path[i]).owner;
    blocks = std::copy_n(tree.blocks(path[i]), tree.ranges(), blocks);
  }
  const PrefixEntry& last = tree.entry(path.back());
  match.behind = impl_->Begin(path.back()) + last.tokens - match.tokens;
  match.leaf = last.children.empty();
  return match;
}

void PrefixIndex::Touch(std::int32_t space, const std::int32_t* tokens, std::int64_t count) {
  const PrefixTree& tree = impl_->tree;
  EvictionOrder& order = impl_->order;
  order.policy().NextRequest();
  const std::int64_t block_tokens = tree.block_tokens(), found = impl_->Match(space, tokens, count);
  for (const std::int32_t id : impl_->path) {
    if (2 * (found - impl_->Begin(id)) >= tree.entry(id).tokens) order.Touch(id);
  }
  std::int64_t end = found / block_tokens * block_tokens;
  std::uint64_t hash = tree.entry(end == 0 ? impl_->roots[space] : impl_->path[end / block_tokens - 1]).hash;
  for (; end + block_tokens <= count; end += block_tokens) {
    hash = HashTokens(hash, tokens + end, block_tokens);
    order.policy().OnMissed(hash);
  }
}

void PrefixIndex::Store(std::int32_t slot, std::int32_t space, const std::int32_t* tokens, std::int64_t count,
                        const std::int32_t* map, std::vector<std::int32_t>* referenced) {
  PrefixTree& tree = impl_->tree;
  EvictionOrder& order = impl_->order;
  if (slot >= static_cast<std::int64_t>(impl_->sequences.size())) impl_->sequences.resize(slot + 1);
  Sequence& sequence = impl_->sequences[slot];
  if (count <= sequence.tokens) return;
  if (sequence.tokens == 0) impl_->SetTip(slot, impl_->roots[space]);
  const std::int64_t block_tokens = tree.block_tokens();
  std::int64_t block = sequence.tokens / block_tokens;
  std::int32_t at = sequence.tokens % block_tokens == 0 ? sequence.tip : tree.entry(sequence.tip).parent;
  impl_->path.clear();
  tree.Walk(at, tokens + block * block_tokens, count - block * block_tokens, &impl_->path);
  block += static_cast<std::int64_t>(impl_->path.size());
  if (!impl_->path.empty()) at = impl_->path.back();
  for (; block * block_tokens < count; ++block) {
    const std::int32_t* const key = tokens + block * block_tokens;
    const std::int64_t length = std::min(block_tokens, count - block * block_tokens);
    std::int32_t found = tree.Covering(at, key, length);
    if (found == kNoEntry) {
      if (!sequence.owned.empty() && tree.entry(sequence.owned.back()).depth == block) {
        found = sequence.owned.back();
        tree.Grow(found, key, length);
        order.policy().OnResized(found);
      } else {
        order.Leave(at);
        found = tree.Add(at, key, length, map + block * tree.ranges());
        tree.entry(found).owner = slot;
        sequence.owned.push_back(found);
        order.policy().Stored(found);
        referenced->insert(referenced->end(), tree.blocks(found), tree.blocks(found) + tree.ranges());
      }
    }
    at = found;
  }
  order.Update(at);
  impl_->SetTip(slot, at);
  sequence.tokens = count;
}

std::int64_t PrefixIndex::Tokens(std::int32_t slot) const {
  return slot < static_cast<std::int64_t>(impl_->sequences.size()) ? impl_->sequences[slot].tokens : 0;
}

void PrefixIndex::Cut(std::int32_t slot, std::int64_t tokens, std::int64_t keep_blocks,
                      std::vector<std::int32_t>* dropped) {
  if (slot < static_cast<std::int64_t>(impl_->sequences.size())) impl_->Cut(slot, tokens, keep_blocks, dropped);
}

void PrefixIndex::Impl::Cut(std::int32_t slot, std::int64_t tokens, std::int64_t keep_blocks,
                            std::vector<std::int32_t>* dropped) {
  Sequence& sequence = sequences[slot];
  const std::int64_t block_tokens = tree.block_tokens();
  const std::int64_t first = tokens / block_tokens, kept = tokens % block_tokens;
  while (!sequence.owned.empty() && Begin(sequence.owned.back()) + tree.entry(sequence.owned.back()).tokens > tokens) {
    const std::int32_t own = sequence.owned.back();
    if (tree.entry(own).depth < keep_blocks) {
      Disown(own);
    } else if (tree.entry(own).depth > first || kept == 0) {
      Remove(own, dropped);
    } else {
      while (!tree.entry(own).children.empty()) Remove(tree.entry(own).children.back(), dropped);
      order.Leave(own);
      const std::int32_t same = tree.Shorten(own, kept);
      if (same == kNoEntry) {
        MoveTips(own, own, tokens);
        order.policy().OnResized(own);
        order.Update(own);
      } else {
        Disown(own);
        MoveTips(own, same, tokens);
        Remove(own, dropped);
      }
    }
  }
  if (sequence.tokens <= tokens) return;
  std::int32_t tip = sequence.tip;
  while (Begin(tip) >= tokens && tree.entry(tip).depth >= 0) tip = tree.entry(tip).parent;
  SetTip(slot, tip);
  sequence.tokens = tokens;
}

void PrefixIndex::Detach(std::int32_t slot) {
  if (slot >= static_cast<std::int64_t>(impl_->sequences.size())) return;
  Sequence& sequence = impl_->sequences[slot];
  for (const std::int32_t id : sequence.owned) impl_->tree.entry(id).owner = -1;
  sequence.owned.clear();
  sequence.tokens = 0;
  impl_->SetTip(slot, kNoEntry);
}

std::vector<PrefixIndex::Eviction> PrefixIndex::PlanEviction(std::int64_t enough, const Freed& count,
                                                             std::int64_t* freed) const {
  const PrefixTree& tree = impl_->tree;
  const auto counted = [&](std::int32_t id) { return count(tree.blocks(id), tree.entry(id).owner); };
  std::vector<Eviction> plan;
  for (const std::int32_t id : impl_->order.Plan(enough, counted, freed)) plan.push_back(Eviction{id});
  return plan;
}

void PrefixIndex::Evict(const std::vector<Eviction>& plan, std::vector<std::int32_t>* dropped) {
  for (const Eviction& eviction : plan) impl_->Remove(static_cast<std::int32_t>(eviction.entry), dropped);
  impl_->evictions += static_cast<std::int64_t>(plan.size());
}

void PrefixIndex::Hint(std::int32_t space, const std::int32_t* tokens, std::int64_t count, PrefixHint hint) {
  impl_->Match(space, tokens, count);
  const std::vector<std::int32_t>& path = impl_->path;
  for (auto id = path.rbegin(); id != path.rend(); ++id) {
    if (hint == PrefixHint::kRetain) {
      impl_->order.Retain(*id);
    } else {
      if (id != path.rbegin() && impl_->tree.entry(*id).children.size() > 1) break;
      impl_->order.Drop(*id);
    }
  }
}

std::int64_t PrefixIndex::Pin(std::int32_t space, const std::int32_t* tokens, std::int64_t count,
                              const PinOptions& options) {
  const std::int64_t found = impl_->Match(space, tokens, count);
  const std::vector<std::int32_t>& path = impl_->path;
  const std::size_t pinned = impl_->pins.Add(space, tokens, count, path, options.most_entries, options.expires);
  if (pinned == 0) return 0;
  impl_->order.Update(path[pinned - 1]);
  return pinned == path.size() ? found : static_cast<std::int64_t>(pinned) * impl_->tree.block_tokens();
}

void PrefixIndex::Unpin(std::int32_t space, const std::int32_t* tokens, std::int64_t count) {
  const std::int32_t end = impl_->pins.Remove(space, tokens, count);
  if (end != kNoEntry) impl_->order.Update(end);
}

void PrefixIndex::ExpirePins(double now) {
  for (const std::int32_t end : impl_->pins.Expire(now)) impl_->order.Update(end);
}

void PrefixIndex::RecordEvents(std::int64_t most) { impl_->tree.events().Start(static_cast<std::size_t>(most)); }

std::vector<PrefixEvent> PrefixIndex::TakeEvents() {
  PrefixTree& tree = impl_->tree;
  const bool incomplete = tree.events().incomplete();
  std::vector<PrefixEvent> events = tree.events().Take();
  if (!tree.events().recording() || !incomplete) return events;
  events.emplace_back();  // kCleared
  ForEach([&](std::int32_t, std::int32_t entry, std::int32_t, const std::int32_t*, std::int64_t) {
    if (tree.Whole(entry)) events.push_back(tree.StoredEvent(entry));
  });
  return events;
}

void PrefixIndex::ForEach(const Visit& visit) const {
  const PrefixTree& tree = impl_->tree;
  std::vector<std::int32_t> next = impl_->roots;
  while (!next.empty()) {
    const std::int32_t id = next.back();
    next.pop_back();
    const PrefixEntry& entry = tree.entry(id);
    next.insert(next.end(), entry.children.rbegin(), entry.children.rend());
    if (entry.tokens > 0) visit(entry.space, id, entry.parent, tree.tokens(id), entry.tokens);
  }
}

PrefixNumbers PrefixIndex::numbers() const {
  return PrefixNumbers{impl_->tree.num_entries(), impl_->tree.num_tokens(), impl_->evictions, impl_->pins.num_pinned()};
}

}  // namespace kvpage
