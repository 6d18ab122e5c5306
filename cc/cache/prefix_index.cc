#include "cache/prefix_index.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "base/token_hash.h"
#include "cache/eviction_order.h"
#include "cache/prefix_pins.h"
#include "cache/prefix_tree.h"
#include "cache/slot_sequences.h"

namespace kvpage {

struct PrefixIndex::Impl {
  Impl(std::int64_t block_tokens, std::int64_t ranges, PrefixPolicy policy)
      : tree(block_tokens, ranges),
        order(&tree, MakePolicy(policy, tree)),
        pins(&tree),
        sequences(&tree, &order, &pins) {}

  // Finds the entries that `tokens` go through and puts them in `path`; the last one may match only partly. Returns the
  // number of tokens matched.
  std::int64_t Match(std::int32_t space, const std::int32_t* tokens, std::int64_t count);

  PrefixTree tree;
  EvictionOrder order;
  PrefixPins pins;
  SlotSequences sequences;
  std::unordered_map<std::string, std::int32_t> spaces;
  std::vector<std::int32_t> roots;
  std::vector<std::int32_t> path;  // of the latest Match
  std::int64_t evictions = 0, unwritten_evictions = 0;
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

PrefixIndex::PrefixIndex(std::int64_t block_tokens, std::int64_t ranges, PrefixPolicy policy)
    : impl_(std::make_unique<Impl>(block_tokens, ranges, policy)) {}
PrefixIndex::~PrefixIndex() = default;

std::int32_t PrefixIndex::Namespace(const std::string& name) {
  const std::int32_t next = static_cast<std::int32_t>(impl_->roots.size());
  const auto [place, added] = impl_->spaces.emplace(name, next);
  if (added) impl_->roots.push_back(impl_->tree.AddRoot(HashName(name), next));
  return place->second;
}

std::vector<std::string> PrefixIndex::Namespaces() const {
  std::vector<std::string> names(impl_->roots.size());
  for (const auto& [name, number] : impl_->spaces) names[number] = name;
  return names;
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
  match.behind = tree.Begin(path.back()) + last.tokens - match.tokens;
  match.leaf = last.children.empty();
  return match;
}

std::int64_t PrefixIndex::Touch(std::int32_t space, const std::int32_t* tokens, std::int64_t count,
                                std::int64_t taken) {
  PrefixTree& tree = impl_->tree;
  EvictionOrder& order = impl_->order;
  std::int64_t fetched = 0;
  order.policy().NextRequest();
  const std::int64_t block_tokens = tree.block_tokens(), found = impl_->Match(space, tokens, count);
  for (const std::int32_t id : impl_->path) {
    if (2 * (found - tree.Begin(id)) >= tree.entry(id).tokens) order.Touch(id);
    if (tree.entry(id).stored == StoreState::kLost) order.SetStored(id, StoreState::kUnwritten);
    if (taken > tree.Begin(id) && std::exchange(tree.entry(id).fetched, false)) {
      fetched += std::min<std::int64_t>(taken - tree.Begin(id), tree.entry(id).tokens);
    }
  }
  std::int64_t end = found / block_tokens * block_tokens;
  std::uint64_t hash = tree.entry(end == 0 ? impl_->roots[space] : impl_->path[end / block_tokens - 1]).hash;
  for (; end + block_tokens <= count; end += block_tokens) {
    hash = HashTokens(hash, tokens + end, block_tokens);
    order.policy().OnMissed(hash);
  }
  return fetched;
}

void PrefixIndex::Store(std::int32_t slot, std::int32_t space, const std::int32_t* tokens, std::int64_t count,
                        const std::int32_t* map, std::vector<std::int32_t>* referenced, std::int64_t own_from,
                        const IsCached& is_cached, std::vector<std::int32_t>* dropped) {
  impl_->sequences.Store(slot, impl_->roots[space], tokens, count, map, own_from, is_cached, referenced, dropped);
}

void PrefixIndex::Add(std::int32_t space, const std::int32_t* tokens, std::int64_t first_block, std::int64_t count,
                      const std::int32_t* blocks, bool fetched) {
  impl_->sequences.Add(impl_->roots[space], tokens, first_block, count, blocks, fetched);
}

bool PrefixIndex::Owns(std::int32_t slot, std::int64_t block) const { return impl_->sequences.Owns(slot, block); }

std::int64_t PrefixIndex::Tokens(std::int32_t slot) const { return impl_->sequences.Tokens(slot); }

void PrefixIndex::Cut(std::int32_t slot, std::int64_t tokens, std::int64_t keep_blocks,
                      std::vector<std::int32_t>* dropped) {
  impl_->sequences.Cut(slot, tokens, keep_blocks, dropped);
}

void PrefixIndex::Detach(std::int32_t slot) { impl_->sequences.Detach(slot); }

std::vector<PrefixIndex::Eviction> PrefixIndex::PlanEviction(std::int64_t enough, const Freed& count,
                                                             std::int64_t* freed) const {
  const PrefixTree& tree = impl_->tree;
  const auto counted = [&](std::int32_t id) { return count(tree.blocks(id), tree.entry(id).owner); };
  std::vector<Eviction> plan;
  for (const std::int32_t id : impl_->order.Plan(enough, counted, freed)) plan.push_back(Eviction{id});
  return plan;
}

void PrefixIndex::Evict(const std::vector<Eviction>& plan, std::vector<std::int32_t>* dropped) {
  const PrefixTree& tree = impl_->tree;
  for (const Eviction& eviction : plan) {
    const auto id = static_cast<std::int32_t>(eviction.entry);
    impl_->unwritten_evictions += tree.Whole(id) && tree.entry(id).stored != StoreState::kWritten;
  }
  for (const Eviction& eviction : plan) impl_->sequences.Remove(static_cast<std::int32_t>(eviction.entry), dropped);
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
  std::int32_t end_before;
  const std::size_t pinned =
      impl_->pins.Add(space, tokens, count, path, options.most_entries, options.expires, &end_before);
  if (pinned == 0) return 0;
  if (end_before != kNoEntry) impl_->order.Update(end_before);
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

bool PrefixIndex::StartWrite(std::int64_t most, const Unused& unused, Unwritten* out) {
  const PrefixTree& tree = impl_->tree;
  std::vector<std::int32_t>& path = impl_->path;
  path.clear();
  impl_->order.FindUnwritten([&](std::int32_t leaf) {
    const PrefixEntry& entry = tree.entry(leaf);
    std::int32_t id = tree.Whole(leaf) ? leaf : entry.parent;
    if (tree.entry(id).depth < 0 || tree.entry(id).stored != StoreState::kUnwritten) return false;
    if (!unused(tree.blocks(leaf), entry.owner)) return false;
    for (; tree.entry(id).depth >= 0; id = tree.entry(id).parent) path.push_back(id);
    return true;
  });
  if (path.empty()) return false;
  std::reverse(path.begin(), path.end());
  const auto written = [&](std::int32_t id) {
    const StoreState state = tree.entry(id).stored;
    out->behind_writes |= state == StoreState::kWriting;
    return state == StoreState::kWriting || state == StoreState::kWritten;
  };
  out->behind_writes = false;
  out->first_block = std::find_if_not(path.begin(), path.end(), written) - path.begin();
  path.resize(std::min<std::size_t>(path.size(), out->first_block + most));
  out->space = tree.entry(path.back()).space;
  out->tokens.clear();
  for (std::size_t i = 0; i < path.size(); ++i) {
    out->tokens.insert(out->tokens.end(), tree.tokens(path[i]), tree.tokens(path[i]) + tree.block_tokens());
    if (static_cast<std::int64_t>(i) >= out->first_block) impl_->order.SetStored(path[i], StoreState::kWriting);
  }
  return true;
}

PrefixIndex::Stretch PrefixIndex::FindWhole(std::int32_t space, const std::int32_t* tokens, std::int64_t count,
                                            std::int64_t first_block) const {
  const PrefixTree& tree = impl_->tree;
  std::vector<std::int32_t> path;
  tree.Walk(impl_->roots[space], tokens, count, &path);
  Stretch found;
  for (std::size_t i = first_block; i < path.size(); ++i) {
    const std::int32_t* const blocks = tree.blocks(path[i]);
    found.blocks.insert(found.blocks.end(), blocks, blocks + tree.ranges());
    found.owners.push_back(tree.entry(path[i]).owner);
    found.marks.push_back({path[i], tree.version(path[i])});
  }
  return found;
}

bool PrefixIndex::Unchanged(const EntryMark& mark) const { return impl_->tree.version(mark.entry) == mark.version; }

void PrefixIndex::EndWrite(std::int32_t space, const std::int32_t* tokens, std::int64_t count, std::int64_t first_block,
                           bool ok) {
  std::vector<std::int32_t>& path = impl_->path;
  path.clear();
  impl_->tree.Walk(impl_->roots[space], tokens, count, &path);
  for (std::size_t i = first_block; i < path.size(); ++i) {
    const StoreState before = impl_->tree.entry(path[i]).stored;
    if (ok || before == StoreState::kWriting) {
      impl_->order.SetStored(path[i], ok ? StoreState::kWritten : StoreState::kFailed);
    }
  }
}

void PrefixIndex::LoseWritten(std::int32_t space, const std::int32_t* tokens, std::int64_t count,
                              std::int64_t first_block) {
  std::vector<std::int32_t>& path = impl_->path;
  path.clear();
  impl_->tree.Walk(impl_->roots[space], tokens, count, &path);
  for (std::size_t i = first_block; i < path.size(); ++i) {
    if (impl_->tree.entry(path[i]).stored == StoreState::kWritten) impl_->order.SetStored(path[i], StoreState::kLost);
  }
}

void PrefixIndex::RecordEvents(std::int64_t most) { impl_->tree.events().Start(static_cast<std::size_t>(most)); }

bool PrefixIndex::recording() const { return impl_->tree.events().recording(); }

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

PrefixIndex::Place PrefixIndex::PlaceOf(std::int32_t entry) const {
  return {impl_->tree.blocks(entry), impl_->tree.entry(entry).depth};
}

bool PrefixIndex::IsIn(std::int32_t block) const { return impl_->tree.EntryIn(block) != kNoEntry; }

void PrefixIndex::ReplaceBlock(std::int32_t from, std::int32_t to) { impl_->tree.ReplaceBlock(from, to); }

PrefixNumbers PrefixIndex::numbers() const {
  PrefixNumbers numbers;
  numbers.entries = impl_->tree.num_entries();
  numbers.tokens = impl_->tree.num_tokens();
  numbers.evictions = impl_->evictions;
  numbers.pinned = impl_->pins.num_pinned();
  numbers.stored = impl_->tree.num_stored();
  numbers.unwritten_evictions = impl_->unwritten_evictions;
  return numbers;
}

}  // namespace kvpage
