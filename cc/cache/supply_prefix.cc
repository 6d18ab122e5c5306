// The part of Supply for sequences in the prefix index (prefix_index.h): updates the index with what slots hold, and
// evicts from it.
#include <algorithm>
#include <chrono>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "cache/supply.h"

namespace kvpage {

PrefixIndex& Supply::OpenIndex(const MappingLock&) {
  const Geometry& geometry = table_->geometry();
  if (index_ == nullptr) index_ = std::make_unique<PrefixIndex>(geometry.block_tokens, geometry.num_ranges());
  return *index_;
}

void Supply::SyncIndex(const MappingLock& lock) {
  if (index_ == nullptr) return;
  struct Row {
    std::int32_t slot = 0, space = -1;
    std::int64_t fewest = 0;
    std::vector<std::int32_t> ids;
  };
  std::vector<Row> rows;
  {
    const StateLock state = table_->Lock();
    for (const std::int32_t slot : table_->TakeCommits(state)) {
      const HostSlot& host = table_->host(state, slot);
      if (host.space < 0 || host.state == SlotState::kDraining) continue;  // noted again when it is free
      if (host.dropped > 0) continue;
      Row row{slot, host.space, host.fewest, host.committed};
      const auto most = std::min<std::int64_t>(row.ids.size(), host.exact);
      row.ids.resize(most);
      // Blocks that a queued truncation may replace will soon no longer belong to the sequence.
      if (host.truncations > 0) row.ids.resize(table_->Lendable(state, slot, most));
      table_->NoteStored(state, slot);
      rows.push_back(std::move(row));
    }
  }
  for (const Row& row : rows) {
    // These tokens were never written, so nobody may find them, although another slot may still map their blocks.
    if (index_->Tokens(row.slot) > row.fewest) Cut(lock, row.slot, row.fewest, /*keep=*/0);
    const std::int64_t mapped = arena_->blocks(row.slot) * table_->geometry().block_tokens;
    const std::int64_t count = std::min<std::int64_t>(row.ids.size(), mapped);
    std::vector<std::int32_t> referenced, dropped;
    const auto is_cached = [&](std::int32_t block) { return arena_->pool().cached(block); };
    index_->Store(row.slot, row.space, row.ids.data(), count, arena_->map(row.slot), &referenced,
                  arena_->ReadOnlyBlocks(row.slot), is_cached, &dropped);
    arena_->SetCached(referenced);
    arena_->DropCached(dropped);
  }
}

void Supply::CutIndex(const MappingLock& lock, std::int32_t slot, std::int64_t tokens) {
  if (index_ == nullptr || index_->Tokens(slot) <= tokens) return;
  // Shared blocks stay findable if they are written. With a mirror, the host does not know which ones are.
  const std::int64_t written = table_->progress(table_->Lock()).WrittenInAllLayers(slot);
  Cut(lock, slot, tokens, std::min(arena_->SharedBlocks(slot), written / table_->geometry().block_tokens));
}

void Supply::Cut(const MappingLock&, std::int32_t slot, std::int64_t tokens, std::int64_t keep) {
  std::vector<std::int32_t> dropped;
  index_->Cut(slot, tokens, keep, &dropped);
  arena_->DropCached(dropped);
}

Status Supply::Empty(const MappingLock&, std::int32_t slot) {
  KVPAGE_RETURN_IF_ERROR(arena_->Shrink(slot, 0));
  arena_->CloseFile(slot);
  if (index_ != nullptr && index_->Tokens(slot) > 0) index_->Detach(slot);
  table_->ForgetSequence(table_->Lock(), slot);
  return {};
}

bool Supply::CanAlias(const MappingLock& lock, std::int64_t mappings) { return PromiseAliases(lock, mappings).ok(); }

std::vector<PrefixIndex::Eviction> Supply::PlanEviction(const MappingLock&, std::int64_t enough, std::int64_t* freed,
                                                        std::vector<std::int32_t>* owners,
                                                        const std::unordered_set<std::int32_t>* allowed) const {
  *freed = 0;
  if (index_ == nullptr || arena_->pool().num_cached() == 0 || enough <= 0) return {};
  const std::int64_t ranges = table_->geometry().num_ranges();
  const BlockPool& pool = arena_->pool();
  std::unordered_map<std::int32_t, std::int32_t> dropped;  // mappings of slots that will be emptied
  std::unordered_map<std::int32_t, std::int64_t> ends;     // for parked slots: number of logical blocks that they keep
  // Leaves are evicted first, so a parked slot loses its blocks from its end.
  constexpr std::int64_t kInUse = -1, kStays = -2;
  const auto count = [&](const std::int32_t* blocks, std::int32_t owner) -> std::int64_t {
    if (allowed != nullptr && allowed->count(blocks[0]) == 0) return kStays;
    // Nobody occupies a free slot while the mapping mutex is held.
    const bool parked = owner >= 0 && table_->host(table_->Lock(), owner).idle();
    for (std::int64_t range = 0; range < ranges; ++range) {
      const auto found = dropped.find(blocks[range]);
      const std::int32_t gone = (found == dropped.end() ? 0 : found->second) + (parked ? 1 : 0);
      if (pool.references(blocks[range]) > gone) return kInUse;
    }
    if (!parked) return ranges;
    const std::int32_t* const map = arena_->map(owner);
    std::int64_t& end = ends.try_emplace(owner, arena_->blocks(owner)).first->second;
    std::int64_t at = end - 1;
    while (at >= 0 && map[at * ranges] != blocks[0]) --at;
    if (at < 0) return kStays;
    end = at;
    const std::int64_t read_only = arena_->ReadOnlyBlocks(owner);
    while (end > read_only && !pool.cached(map[(end - 1) * ranges])) --end;
    if (end > read_only) return ranges;
    for (std::int64_t i = 0; i < read_only * ranges; ++i) ++dropped[map[i]];
    return ranges;
  };
  std::vector<PrefixIndex::Eviction> plan = index_->PlanEviction(enough, count, freed);
  if (*freed < enough) {
    // A running sequence may continue entries whose blocks are another slot's, if both have computed the same tokens.
    // Its entries are dropped with those, and are stored again, in its own blocks, when it commits more.
    dropped.clear();
    ends.clear();
    const auto through = [&](const std::int32_t* blocks, std::int32_t owner) {
      const std::int64_t number = count(blocks, owner);
      return number == kInUse ? 0 : number;
    };
    plan = index_->PlanEviction(enough, through, freed);
  }
  for (const auto& [slot, unused] : ends) owners->push_back(slot);
  return plan;
}

double Supply::Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Supply::EvictionPlan Supply::PlanEvictionOf(const MappingLock& lock, std::int64_t blocks,
                                            const std::unordered_set<std::int32_t>* allowed) {
  EvictionPlan plan;
  if (index_ == nullptr) return plan;
  Refresh(lock);  // parked slots give up blocks that they only share
  index_->ExpirePins(Now());
  plan.entries = PlanEviction(lock, blocks, &plan.freed, &plan.owners, allowed);
  return plan;
}

void Supply::ApplyEviction(const MappingLock& lock, const EvictionPlan& plan) {
  if (plan.entries.empty()) return;
  std::vector<std::int32_t> dropped;
  index_->Evict(plan.entries, &dropped);
  if (on_pressure_) on_pressure_();
  arena_->DropCached(dropped);
  for (const std::int32_t slot : plan.owners) {
    // Blocks that stay mapped after the cached ones would not become free otherwise.
    if (!arena_->HasCached(slot, arena_->ReadOnlyBlocks(slot))) {
      static_cast<void>(Empty(lock, slot));
      continue;
    }
    static_cast<void>(arena_->Shrink(slot, arena_->blocks(slot) - arena_->UncachedTail(slot)));
    table_->KeepTokens(table_->Lock(), slot, index_->Tokens(slot));
  }
}

std::int64_t Supply::Evict(const MappingLock& lock, std::int64_t blocks, bool partial) {
  if (index_ == nullptr) return 0;
  const EvictionPlan plan = PlanEvictionOf(lock, blocks);
  if (plan.freed < blocks && !partial) return 0;
  ApplyEviction(lock, plan);
  return plan.freed;
}

}  // namespace kvpage
