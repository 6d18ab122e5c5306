#include "store/directory.h"

#include <algorithm>
#include <limits>
#include <set>
#include <tuple>

#include "base/token_hash.h"

namespace kvpage::store {

std::int32_t Directory::FindRoot(const Identity& identity) const {
  const auto found = std::find(identities_.begin(), identities_.end(), identity);
  return found == identities_.end() ? -1 : roots_[found - identities_.begin()];
}

std::int32_t Directory::Child(std::int32_t parent, std::uint64_t hash, const std::int32_t* tokens,
                              std::int64_t count) const {
  const auto [begin, end] = by_hash_.equal_range(hash);
  for (auto at = begin; at != end; ++at) {
    const Node& node = nodes_[at->second];
    if (node.parent == parent && std::equal(node.tokens.begin(), node.tokens.end(), tokens, tokens + count)) {
      return at->second;
    }
  }
  return -1;
}

std::int32_t Directory::NewNode(std::int32_t parent, std::uint64_t hash, const std::int32_t* tokens,
                                std::int64_t count) {
  std::int32_t id = static_cast<std::int32_t>(nodes_.size());
  if (unused_nodes_.empty()) {
    nodes_.emplace_back();
  } else {
    id = unused_nodes_.back();
    unused_nodes_.pop_back();
  }
  Node& node = nodes_[id];
  node = {};
  node.hash = hash;
  node.parent = parent;
  node.tokens.assign(tokens, tokens + count);
  if (parent < 0) return id;
  node.root = nodes_[parent].root;
  ++nodes_[parent].children;
  by_hash_.emplace(hash, id);
  return id;
}

void Directory::Collect(std::int32_t id) {
  while (nodes_[id].parent >= 0 && nodes_[id].children == 0 && nodes_[id].files.empty()) {
    const std::int32_t parent = nodes_[id].parent;
    const auto [begin, end] = by_hash_.equal_range(nodes_[id].hash);
    by_hash_.erase(std::find_if(begin, end, [&](const auto& item) { return item.second == id; }));
    nodes_[id] = {};
    unused_nodes_.push_back(id);
    --nodes_[parent].children;
    id = parent;
  }
}

std::int32_t Directory::NewFile(const std::string& name, std::int64_t bytes) {
  Remove(name);
  std::int32_t number = static_cast<std::int32_t>(slots_.size());
  if (unused_files_.empty()) {
    slots_.emplace_back();
  } else {
    number = unused_files_.back();
    unused_files_.pop_back();
  }
  slots_[number] = {};
  slots_[number].name = name;
  slots_[number].bytes = bytes;
  files_.emplace(name, number);
  bytes_ += bytes;
  return number;
}

void Directory::Add(const std::string& name, std::int64_t bytes, const FileHeader& header) {
  const std::int32_t number = NewFile(name, bytes);
  std::int32_t at = FindRoot(header.identity);
  if (at < 0) {
    at = NewNode(-1, HashIdentity(header.identity), nullptr, 0);
    nodes_[at].root = static_cast<std::int32_t>(roots_.size());
    roots_.push_back(at);
    identities_.push_back(header.identity);
    root_files_.push_back(0);
  }
  ++root_files_[nodes_[at].root];
  const std::int64_t block_tokens = header.identity.shape.block_tokens;
  File& file = slots_[number];
  file.first_block = header.first_block;
  file.end_block = header.first_block + header.blocks();
  for (std::int64_t block = 0; block < file.end_block; ++block) {
    const std::int32_t* const tokens = header.tokens.data() + block * block_tokens;
    const std::uint64_t hash = HashTokens(nodes_[at].hash, tokens, block_tokens);
    const std::int32_t child = Child(at, hash, tokens, block_tokens);
    at = child >= 0 ? child : NewNode(at, hash, tokens, block_tokens);
    if (block >= file.first_block) nodes_[at].files.emplace_back(number, block - file.first_block);
  }
  file.last = at;
}

void Directory::AddRefused(const std::string& name, std::int64_t bytes, Problem problem) {
  slots_[NewFile(name, bytes)].problem = problem;
  ++refused_[static_cast<int>(problem)];
}

void Directory::Refuse(const std::string& name, Problem problem) {
  const auto found = files_.find(name);
  if (found != files_.end()) AddRefused(name, slots_[found->second].bytes, problem);
}

void Directory::Remove(const std::string& name) {
  const auto found = files_.find(name);
  if (found == files_.end()) return;
  const std::int32_t number = found->second;
  const File& file = slots_[number];
  if (file.last >= 0) {
    --root_files_[nodes_[file.last].root];
  } else {
    --refused_[static_cast<int>(file.problem)];
  }
  std::int32_t at = file.last;
  for (std::int64_t block = file.end_block; block > file.first_block; --block) {
    auto& files = nodes_[at].files;
    files.erase(std::remove_if(files.begin(), files.end(), [&](const auto& part) { return part.first == number; }),
                files.end());
    at = nodes_[at].parent;
  }
  if (file.last >= 0) Collect(file.last);
  bytes_ -= file.bytes;
  unused_files_.push_back(number);
  files_.erase(found);
}

Problem Directory::ProblemOf(const std::string& name) const {
  const auto found = files_.find(name);
  return found == files_.end() ? Problem::kGone : slots_[found->second].problem;
}

std::int64_t Directory::BytesOf(const std::string& name) const {
  const auto found = files_.find(name);
  return found == files_.end() ? 0 : slots_[found->second].bytes;
}

std::vector<std::string> Directory::Names() const {
  std::vector<std::string> names;
  names.reserve(files_.size());
  for (const auto& [name, unused] : files_) names.push_back(name);
  return names;
}

std::vector<StoredPart> Directory::Find(const Identity& identity, const std::int32_t* tokens,
                                        std::int64_t count) const {
  std::vector<StoredPart> parts;
  std::int32_t at = FindRoot(identity), file = -1;
  const std::int64_t block_tokens = identity.shape.block_tokens;
  for (std::int64_t block = 0; at >= 0 && (block + 1) * block_tokens <= count; ++block) {
    const std::uint64_t hash = HashTokens(nodes_[at].hash, tokens + block * block_tokens, block_tokens);
    at = Child(at, hash, tokens + block * block_tokens, block_tokens);
    if (at < 0 || nodes_[at].files.empty()) break;
    const auto& files = nodes_[at].files;
    const auto same = std::find_if(files.begin(), files.end(), [&](const auto& part) { return part.first == file; });
    if (same != files.end()) {
      ++parts.back().end;
      continue;
    }
    file = files.front().first;
    parts.push_back({slots_[file].name, block, block + 1, files.front().second});
  }
  return parts;
}

bool Directory::OtherShape(const Identity& identity) const {
  const auto stored = [&](std::size_t i) { return nodes_[roots_[i]].children > 0; };
  bool other = false;
  for (std::size_t i = 0; i < identities_.size(); ++i) {
    const Identity& each = identities_[i];
    if (each.fingerprint != identity.fingerprint || each.space != identity.space || !stored(i)) continue;
    if (each.shape == identity.shape) return false;
    other = true;
  }
  return other;
}

StoredRun Directory::RunOf(const std::string& name, Identity* identity) const {
  const auto found = files_.find(name);
  if (found == files_.end() || slots_[found->second].last < 0) return {};
  const File& file = slots_[found->second];
  *identity = identities_[nodes_[file.last].root];
  const std::int64_t block_tokens = identity->shape.block_tokens;
  StoredRun run{name, identity->space, {}, file.first_block, file.end_block};
  run.tokens.resize(file.end_block * block_tokens);
  std::int64_t end = file.end_block;
  for (std::int32_t at = file.last; end > 0; at = nodes_[at].parent) {
    const std::vector<std::int32_t>& tokens = nodes_[at].tokens;
    std::copy(tokens.begin(), tokens.end(), run.tokens.begin() + --end * block_tokens);
  }
  return run;
}

std::vector<StoredRun> Directory::Runs(const BlockShape& shape, const std::string& fingerprint) const {
  std::vector<StoredRun> runs;
  for (const auto& [name, number] : files_) {
    const std::int32_t last = slots_[number].last;
    if (last < 0) continue;
    Identity identity = identities_[nodes_[last].root];
    if (!(identity.shape == shape) || identity.fingerprint != fingerprint) continue;
    runs.push_back(RunOf(name, &identity));
  }
  std::stable_sort(runs.begin(), runs.end(), [](const StoredRun& a, const StoredRun& b) {
    return std::tie(a.first_block, a.end_block) < std::tie(b.first_block, b.end_block);
  });
  return runs;
}

std::int64_t Directory::CountForeign(const std::string& fingerprint) const {
  std::int64_t count = 0;
  for (std::size_t i = 0; i < identities_.size(); ++i) {
    if (identities_[i].fingerprint != fingerprint) count += root_files_[i];
  }
  return count;
}

std::vector<std::string> Directory::PlanEviction(std::int64_t limit, const std::map<std::string, double>& used,
                                                 const std::set<std::string>& kept) const {
  // The files that each file continues: those that hold the block before its first one.
  const auto parents = [&](const File& file) {
    std::set<std::int32_t> found;
    if (file.last < 0 || file.first_block == 0) return found;
    std::int32_t at = file.last;
    for (std::int64_t block = file.end_block; block > file.first_block; --block) at = nodes_[at].parent;
    for (const auto& [number, unused] : nodes_[at].files) found.insert(number);
    return found;
  };
  std::vector<std::int64_t> children(slots_.size());
  for (const auto& [name, number] : files_) {
    for (const std::int32_t parent : parents(slots_[number])) ++children[parent];
  }
  std::set<std::pair<double, std::int32_t>> leaves;
  const auto list = [&](std::int32_t number) {
    const File& file = slots_[number];
    if (kept.count(file.name) > 0) return;
    const auto when = used.find(file.name);
    // Files that only this process or this version cannot read may be useful to others.
    const bool useless = file.problem == Problem::kDamaged || file.problem == Problem::kTruncated;
    const double newest = std::numeric_limits<double>::infinity();
    leaves.emplace(useless ? 0 : when == used.end() ? newest : when->second, number);
  };
  for (const auto& [name, number] : files_) {
    if (children[number] == 0) list(number);
  }
  std::vector<std::string> plan;
  for (std::int64_t left = bytes_; left > limit && !leaves.empty();) {
    const std::int32_t number = leaves.begin()->second;
    leaves.erase(leaves.begin());
    plan.push_back(slots_[number].name);
    left -= slots_[number].bytes;
    for (const std::int32_t parent : parents(slots_[number])) {
      if (--children[parent] == 0) list(parent);
    }
  }
  return plan;
}

}  // namespace kvpage::store
