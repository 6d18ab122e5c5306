#include "cache/prefix_tree.h"

#include <algorithm>
#include <cstring>

#include "base/token_hash.h"

namespace kvpage {
namespace {

constexpr std::int64_t kAhead = 16;  // blocks looked up before the first of them is compared

std::int64_t Common(const std::int32_t* a, std::int64_t num_a, const std::int32_t* b, std::int64_t num_b) {
  const std::int64_t most = std::min(num_a, num_b);
  std::int64_t common = 0;
  while (common < most && a[common] == b[common]) ++common;
  return common;
}

void Prefetch(const void* begin, std::size_t bytes) {
  for (std::size_t offset = 0; offset < bytes; offset += 64) {
    __builtin_prefetch(static_cast<const char*>(begin) + offset);
  }
}

}  // namespace

std::int32_t PrefixTree::NewId() {
  if (!unused_.empty()) {
    const std::int32_t id = unused_.back();
    unused_.pop_back();
    return id;
  }
  if ((num_ids_ & kChunkMask) == 0) {
    entries_.push_back(std::make_unique<PrefixEntry[]>(kChunkMask + 1));
    rows_.push_back(std::make_unique<std::int32_t[]>((kChunkMask + 1) * (block_tokens_ + ranges_)));
  }
  versions_.push_back(0);
  return num_ids_++;
}

void PrefixTree::NoteEntryIn(std::int32_t block, std::int32_t id) {
  if (block >= static_cast<std::int64_t>(entries_in_.size())) entries_in_.resize(block + 1, kNoEntry);
  entries_in_[block] = id;
}

void PrefixTree::ReplaceBlock(std::int32_t from, std::int32_t to) {
  const std::int32_t id = EntryIn(from);
  if (id == kNoEntry) return;
  std::int32_t* const row = Row(id) + block_tokens_;
  std::replace(row, row + ranges_, from, to);
  ++versions_[id];
  entries_in_[from] = kNoEntry;
  NoteEntryIn(to, id);
}

std::int32_t PrefixTree::AddRoot(std::uint64_t hash, std::int32_t space) {
  const std::int32_t id = NewId();
  entry(id) = PrefixEntry();
  entry(id).hash = hash;
  entry(id).space = space;
  return id;
}

std::int32_t PrefixTree::Add(std::int32_t parent, const std::int32_t* tokens, std::int64_t count,
                             const std::int32_t* blocks) {
  const std::int32_t id = NewId();
  PrefixEntry& added = entry(id);
  added = PrefixEntry();
  added.parent = parent;
  added.depth = entry(parent).depth + 1;
  added.space = entry(parent).space;
  added.tokens = static_cast<std::int32_t>(count);
  std::copy_n(tokens, count, Row(id));
  std::copy_n(blocks, ranges_, Row(id) + block_tokens_);
  for (std::int64_t range = 0; range < ranges_; ++range) NoteEntryIn(blocks[range], id);
  Link(id);
  ++num_entries_;
  num_tokens_ += count;
  return id;
}

void PrefixTree::Grow(std::int32_t id, const std::int32_t* tokens, std::int64_t count) {
  Unlink(id);
  ++versions_[id];
  num_tokens_ += count - entry(id).tokens;
  entry(id).tokens = static_cast<std::int32_t>(count);
  std::copy_n(tokens, count, Row(id));
  Link(id);
}

void PrefixTree::SetStored(std::int32_t id, StoreState state) {
  const auto counts = [](StoreState each) { return each == StoreState::kWriting || each == StoreState::kWritten; };
  num_stored_ += counts(state) - counts(entry(id).stored);
  entry(id).stored = state;
}

std::int32_t PrefixTree::Shorten(std::int32_t id, std::int64_t count) {
  SetStored(id, StoreState::kUnwritten);
  Unlink(id);
  ++versions_[id];
  num_tokens_ -= entry(id).tokens - count;
  entry(id).tokens = static_cast<std::int32_t>(count);
  const std::int32_t covering = Covering(entry(id).parent, tokens(id), count);
  Link(id);
  return covering != kNoEntry && entry(covering).tokens == count ? covering : kNoEntry;
}

void PrefixTree::Remove(std::int32_t id) {
  SetStored(id, StoreState::kUnwritten);
  Unlink(id);
  for (std::int64_t range = 0; range < ranges_; ++range) {
    const std::int32_t block = blocks(id)[range];
    if (entries_in_[block] == id) entries_in_[block] = kNoEntry;
  }
  --num_entries_;
  ++versions_[id];
  num_tokens_ -= entry(id).tokens;
  entry(id) = PrefixEntry();
  unused_.push_back(id);
}

std::size_t PrefixTree::LowerBound(const std::vector<std::int32_t>& children, const std::int32_t* key,
                                   std::int64_t count) const {
  const auto before = [&](std::int32_t child, const std::int32_t* sought) {
    const std::int64_t common = Common(tokens(child), entry(child).tokens, sought, count);
    if (common == count) return false;
    return common == entry(child).tokens || tokens(child)[common] < sought[common];
  };
  return std::lower_bound(children.begin(), children.end(), key, before) - children.begin();
}

void PrefixTree::Link(std::int32_t id) {
  PrefixEntry& linked = entry(id);
  std::vector<std::int32_t>& siblings = entry(linked.parent).children;
  siblings.insert(siblings.begin() + LowerBound(siblings, tokens(id), linked.tokens), id);
  if (linked.tokens < block_tokens_) return;
  linked.hash = HashTokens(entry(linked.parent).hash, tokens(id), block_tokens_);
  Insert(id);
  if (events_.recording()) events_.Add(StoredEvent(id));
}

void PrefixTree::Unlink(std::int32_t id) {
  const PrefixEntry& unlinked = entry(id);
  std::vector<std::int32_t>& siblings = entry(unlinked.parent).children;
  std::size_t place = LowerBound(siblings, tokens(id), unlinked.tokens);
  while (siblings[place] != id) ++place;  // during Shorten there may be two equal siblings
  siblings.erase(siblings.begin() + place);
  if (unlinked.tokens < block_tokens_) return;
  Erase(id);
  if (events_.recording()) events_.Add(PrefixEvent{PrefixEvent::Kind::kRemoved, unlinked.hash, 0, 0, {}});
}

PrefixEvent PrefixTree::StoredEvent(std::int32_t id) const {
  const PrefixEntry& stored = entry(id);
  const std::uint64_t parent = stored.depth == 0 ? 0 : entry(stored.parent).hash;
  return PrefixEvent{
      PrefixEvent::Kind::kStored, stored.hash, stored.space, parent, {tokens(id), tokens(id) + block_tokens_}};
}

void PrefixTree::Walk(std::int32_t from, const std::int32_t* tokens, std::int64_t count,
                      std::vector<std::int32_t>* path) const {
  const std::int64_t blocks = count / block_tokens_;
  std::uint64_t hashes[kAhead];
  std::int32_t found[kAhead];
  std::uint64_t hash = entry(from).hash;
  std::int32_t parent = from;
  for (std::int64_t first = 0; first < blocks; first += kAhead) {
    const std::int64_t window = std::min(kAhead, blocks - first);
    for (std::int64_t i = 0; i < window; ++i) {
      hashes[i] = hash = HashTokens(hash, tokens + (first + i) * block_tokens_, block_tokens_);
      __builtin_prefetch(&buckets_[Home(hash)]);
    }
    for (std::int64_t i = 0; i < window; ++i) {
      std::size_t at = Home(hashes[i]);
      while (buckets_[at].id != kNoEntry && buckets_[at].tag != Tag(hashes[i])) at = (at + 1) & (buckets_.size() - 1);
      found[i] = buckets_[at].id;
      if (found[i] == kNoEntry) break;  // the blocks after it do not count
      __builtin_prefetch(&entry(found[i]));
      Prefetch(Row(found[i]), (block_tokens_ + ranges_) * sizeof(std::int32_t));
    }
    for (std::int64_t i = 0; i < window; ++i) {
      const std::int32_t* const block = tokens + (first + i) * block_tokens_;
      if (found[i] == kNoEntry) return;
      if (!Same(found[i], parent, block)) found[i] = Lookup(hashes[i], parent, block);
      if (found[i] == kNoEntry) return;
      path->push_back(parent = found[i]);
    }
  }
}

std::int32_t PrefixTree::Nearest(std::int32_t parent, const std::int32_t* key, std::int64_t count,
                                 std::int64_t* common) const {
  const std::vector<std::int32_t>& children = entry(parent).children;
  const std::size_t place = LowerBound(children, key, count);
  *common = 0;
  for (std::size_t i = place > 0 ? place - 1 : 0; i <= place && i < children.size(); ++i) {
    *common = std::max(*common, Common(tokens(children[i]), entry(children[i]).tokens, key, count));
  }
  return *common == 0 ? kNoEntry : children[LowerBound(children, key, *common)];
}

std::int32_t PrefixTree::Covering(std::int32_t parent, const std::int32_t* key, std::int64_t count) const {
  if (count == block_tokens_) return Lookup(HashTokens(entry(parent).hash, key, count), parent, key);
  const std::vector<std::int32_t>& children = entry(parent).children;
  const std::size_t place = LowerBound(children, key, count);
  if (place == children.size()) return kNoEntry;
  const std::int32_t child = children[place];
  return Common(tokens(child), entry(child).tokens, key, count) == count ? child : kNoEntry;
}

std::int32_t PrefixTree::Shorter(std::int32_t parent, const std::int32_t* key, std::int64_t count,
                                 const std::int32_t* blocks) const {
  const std::vector<std::int32_t>& children = entry(parent).children;
  for (std::int64_t length = count - 1; length > 0; --length) {
    const std::size_t place = LowerBound(children, key, length);
    if (place == children.size()) continue;
    const std::int32_t child = children[place];
    if (entry(child).tokens == length && Common(tokens(child), length, key, length) == length &&
        std::equal(blocks, blocks + ranges_, this->blocks(child))) {
      return child;
    }
  }
  return kNoEntry;
}

bool PrefixTree::Same(std::int32_t id, std::int32_t parent, const std::int32_t* key) const {
  return entry(id).parent == parent && std::memcmp(tokens(id), key, block_tokens_ * sizeof(*key)) == 0;
}

std::int32_t PrefixTree::Lookup(std::uint64_t hash, std::int32_t parent, const std::int32_t* key) const {
  for (std::size_t at = Home(hash); buckets_[at].id != kNoEntry; at = (at + 1) & (buckets_.size() - 1)) {
    if (buckets_[at].tag == Tag(hash) && Same(buckets_[at].id, parent, key)) return buckets_[at].id;
  }
  return kNoEntry;
}

void PrefixTree::Insert(std::int32_t id) {
  if (2 * (num_whole_ + 1) > buckets_.size()) {
    std::vector<Bucket> old(2 * buckets_.size(), Bucket{0, kNoEntry});
    old.swap(buckets_);
    num_whole_ = 0;
    for (const Bucket& bucket : old) {
      if (bucket.id != kNoEntry) Insert(bucket.id);
    }
  }
  const std::uint64_t hash = entry(id).hash;
  std::size_t at = Home(hash);
  while (buckets_[at].id != kNoEntry) at = (at + 1) & (buckets_.size() - 1);
  buckets_[at] = Bucket{Tag(hash), id};
  ++num_whole_;
}

void PrefixTree::Erase(std::int32_t id) {
  const std::size_t mask = buckets_.size() - 1;
  std::size_t hole = Home(entry(id).hash);
  while (buckets_[hole].id != id) hole = (hole + 1) & mask;
  // Move later entries into the hole unless that would put them before their home position, so that no search stops at
  // the hole too early.
  for (std::size_t at = (hole + 1) & mask; buckets_[at].id != kNoEntry; at = (at + 1) & mask) {
    const std::size_t home = Home(entry(buckets_[at].id).hash);
    if (((at - home) & mask) < ((at - hole) & mask)) continue;
    buckets_[hole] = buckets_[at];
    hole = at;
  }
  buckets_[hole] = Bucket{0, kNoEntry};
  --num_whole_;
}

}  // namespace kvpage
