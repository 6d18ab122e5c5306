#include "cache/inspect.h"

#include <set>
#include <utility>

namespace kvpage::inspect {
namespace {

Status CheckBlockMap(const PoolParts& pool, std::int32_t slot, const char* op = "block_map") {
  const StateLock state = pool.table->Lock();
  KVPAGE_RETURN_IF_ERROR(pool.table->CheckOpen(state, op));
  CollectReleases(pool, state);
  return pool.table->CheckOccupied(state, op, slot);
}

}  // namespace

PoolNumbers Numbers(const PoolParts& pool) {
  SlotTable& table = *pool.table;
  const MappingLock mapping = pool.supply->Lock();
  pool.supply->FinishChanges(mapping);
  CollectReleases(pool, table.Lock());
  pool.supply->SyncIndex(mapping);
  const Arena& arena = pool.supply->arena(mapping);
  PoolNumbers n;
  if (pool.mirror == nullptr) n.memory_mappings = arena.CountMemoryMappings();
  const StateLock state = table.Lock();
  const BlockPool& blocks = arena.pool();
  if (const PrefixIndex* const index = pool.supply->index(mapping)) {
    n.prefix_evictions = index->numbers().evictions;
    n.prefix_tokens = index->numbers().tokens;
  }
  n.prefix_queries = pool.supply->counts(mapping).queries;
  n.prefix_hits = pool.supply->counts(mapping).hits;
  n.blocks_total = blocks.budget();
  n.blocks_free = blocks.num_free();
  n.blocks_shared = blocks.num_shared();
  n.blocks_peak = blocks.peak_used();
  n.blocks_warm = blocks.num_warm();
  // A block counts for the slot that will keep it longest.
  enum Class : std::int8_t { kMapped = 0, kDraining, kParked, kNumClasses };
  std::vector<std::int8_t> classes(table.num_slots());
  for (std::int64_t slot = 0; slot < table.num_slots(); ++slot) {
    switch (table.host(state, slot).state) {
      case SlotState::kOccupied:
        classes[slot] = kMapped;
        ++n.slots_occupied;
        n.blocks_spare += arena.SpareOf(slot, table.geometry().BlocksFor(table.host(state, slot).reserved));
        break;
      case SlotState::kDraining:
        classes[slot] = kDraining;
        ++n.slots_draining;
        break;
      case SlotState::kFree:
        classes[slot] = kParked;
        n.slots_parked += arena.mappings(slot) > 0;
        break;
    }
  }
  const SwapTable& swaps = pool.supply->swaps(mapping);
  const SwapTable::Blocks swapped = swaps.FindBlocks(table.geometry().num_ranges());
  std::vector<Arena::Classed> others;
  for (const std::int32_t block : swapped.held) others.emplace_back(block, kMapped);
  for (const std::int32_t block : swapped.writing) others.emplace_back(block, kDraining);
  const std::vector<std::int64_t> counts = arena.CountByClass(classes, kNumClasses, others);
  std::set<std::int32_t> different(swapped.held.begin(), swapped.held.end());
  different.insert(swapped.writing.begin(), swapped.writing.end());
  n.blocks_swapped = static_cast<std::int64_t>(different.size());
  n.sequences_swapped = static_cast<std::int64_t>(swaps.swaps().size());
  n.swaps = swaps.counts();
  n.handovers = pool.supply->handovers(mapping);
  n.blocks_received = blocks.num_backed(Backing::kReceived);
  n.blocks_mapped = counts[kMapped] + arena.num_set_aside() + arena.num_filling();
  n.blocks_draining = counts[kDraining];
  n.blocks_parked = counts[kParked] + blocks.num_detached();
  n.blocks_cached = blocks.num_cached();
  n.block_bytes = table.geometry().block_bytes;
  n.virtual_bytes = table.geometry().virtual_bytes();
  n.physical_bytes = arena.vmm().PhysicalBytes();
  n.system_calls = arena.vmm().system_calls();
  n.waits = table.waits(state) + (pool.mirror != nullptr ? pool.mirror->waits() : 0);
  return n;
}

std::vector<SlotRow> Rows(const PoolParts& pool) {
  SlotTable& table = *pool.table;
  const MappingLock mapping = pool.supply->Lock();
  pool.supply->FinishChanges(mapping);
  const StateLock state = table.Lock();
  CollectReleases(pool, state);
  std::vector<SlotRow> rows;
  for (std::int32_t slot = 0; slot < table.num_slots(); ++slot) {
    const HostSlot& row = table.host(state, slot);
    if (row.state == SlotState::kFree) continue;
    const Arena& arena = pool.supply->arena(mapping);
    const std::int64_t shared = arena.CountShared(slot) * table.geometry().num_ranges();
    const SlotProgress& progress = table.progress(state).slots[slot];
    rows.push_back({slot, row.state, arena.mappings(slot), shared, row.reserved,
                    static_cast<std::int64_t>(row.committed.size()), progress.length, row.views, progress.vacated,
                    row.dropped});
  }
  return rows;
}

Status Audit(const PoolParts& pool) {
  const MappingLock mapping = pool.supply->Lock();
  const SwapTable::Blocks swapped = pool.supply->swaps(mapping).FindBlocks(pool.table->geometry().num_ranges());
  std::vector<std::int32_t> blocks = swapped.held;
  blocks.insert(blocks.end(), swapped.writing.begin(), swapped.writing.end());
  return pool.supply->arena(mapping).Audit(blocks);
}

Status BlockMap(const PoolParts& pool, std::int32_t slot, BlockReferences* out) {
  const MappingLock mapping = pool.supply->Lock();
  pool.supply->FinishChanges(mapping);
  KVPAGE_RETURN_IF_ERROR(CheckBlockMap(pool, slot));
  const Arena& arena = pool.supply->arena(mapping);
  const std::int64_t ranges = pool.table->geometry().num_ranges();
  out->assign(ranges, {});
  for (std::int64_t range = 0; range < ranges; ++range) {
    for (const std::int32_t block : arena.block_map(slot, range)) {
      (*out)[range].emplace_back(block, block < 0 ? 0 : arena.pool().references(block));
    }
  }
  return {};
}

Status SlotMemory(const PoolParts& pool, std::int32_t slot, MemoryRanges* out) {
  const MappingLock mapping = pool.supply->Lock();
  pool.supply->FinishChanges(mapping);
  KVPAGE_RETURN_IF_ERROR(CheckBlockMap(pool, slot, "memory_ranges"));
  const Arena& arena = pool.supply->arena(mapping);
  const Geometry& geometry = pool.table->geometry();
  const std::int64_t hole = arena.hole(slot), bytes = (arena.blocks(slot) - hole) * geometry.block_bytes;
  const auto base = reinterpret_cast<std::uint64_t>(pool.supply->base());
  out->clear();
  for (std::int64_t range = 0; range < geometry.num_ranges(); ++range) {
    out->emplace_back(base + static_cast<std::uint64_t>(geometry.Offset(slot, range, hole)), bytes);
  }
  return {};
}

Status BlockOwners(const PoolParts& pool, std::int32_t slot, BlockRows* out) {
  const MappingLock mapping = pool.supply->Lock();
  pool.supply->FinishChanges(mapping);
  KVPAGE_RETURN_IF_ERROR(CheckBlockMap(pool, slot));
  const Arena& arena = pool.supply->arena(mapping);
  const std::int64_t ranges = pool.table->geometry().num_ranges();
  out->assign(ranges, {});
  for (std::int64_t range = 0; range < ranges; ++range) {
    const std::vector<std::int32_t> blocks = arena.block_map(slot, range);
    for (std::int64_t logical = 0; logical < arena.blocks(slot); ++logical) {
      BlockRow row;
      row.block = blocks[logical];
      if (row.block >= 0) row.references = arena.pool().references(row.block);
      row.slots = arena.Mappers(slot, range, logical);
      for (const std::int32_t mapper : row.slots) {
        if (logical >= arena.ReadOnlyBlocks(mapper)) row.owner = mapper;
      }
      (*out)[range].push_back(std::move(row));
    }
  }
  return {};
}

}  // namespace kvpage::inspect
