#include "cache/placing.h"

#include <memory>

namespace kvpage::placing {

Claim EmptySlots(const PoolParts& pool, const MappingLock& mapping, std::size_t count) {
  Claim claim;
  claim.slots = pool.supply->FewestBlocks(mapping, count);
  if (claim.slots.size() < count) {
    claim.status = ResourceExhausted("no free slot", Reason::kOutOfSlots);
    claim.wanted = static_cast<std::int64_t>(count);
    claim.free = static_cast<std::int64_t>(claim.slots.size());
    claim.draining = pool.table->NumDraining(pool.table->Lock());
    return claim;
  }
  for (const std::int32_t slot : claim.slots) {
    claim.status = pool.supply->Empty(mapping, slot);
    if (!claim.status.ok()) break;
  }
  return claim;
}

Status Place(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot, const Placed& placed) {
  SlotTable& table = *pool.table;
  const Geometry& geometry = table.geometry();
  const std::int64_t ranges = geometry.num_ranges();
  Arena& arena = pool.supply->arena(mapping);
  const auto tokens = static_cast<std::int64_t>(placed.ids.size());
  const auto count = static_cast<std::int64_t>(placed.blocks.size()) / ranges;
  const auto sealed = [&](std::int64_t logical) { return arena.pool().sealed(placed.blocks[logical * ranges]); };
  const auto shared = [&](std::int64_t logical) {
    const std::int32_t block = placed.blocks[logical * ranges];
    return sealed(logical) || arena.pool().references(block) > 1 || arena.pool().cached(block);
  };
  std::int64_t read_only = tokens / geometry.block_tokens;
  while (read_only > 0 && !shared(read_only - 1)) --read_only;
  // A sequence may write after the tokens of its last block, unless that block is sealed.
  if (count > 0 && sealed(count - 1)) read_only = count;
  const bool partial_shared = read_only < count && shared(count - 1);
  const std::int64_t limit = partial_shared ? tokens : read_only * geometry.block_tokens;
  table.OccupySwapped(table.Lock(), slot, placed.ids, placed.space, placed.prompt, limit);
  Status status = pool.supply->Alias(mapping, {{slot, placed.blocks.data(), read_only}});
  if (status.ok()) status = arena.Adopt(slot, placed.blocks.data() + read_only * ranges, count - read_only);
  if (status.ok()) {
    table.Reserve(table.Lock(), slot, tokens);
    status = PublishSlots(pool, mapping, {slot});
  }
  if (!status.ok()) {
    Leave(pool, mapping, slot);
    return status;
  }
  if (pool.mirror != nullptr) pool.mirror->ClearVacated(slot);
  // Views show this memory, but there are no views if the host cannot read it.
  std::shared_ptr<BlockMover> mover;
  const bool readable = arena.Mover(&mover).ok() && mover == nullptr;
  if (readable && !partial_shared && read_only < count) {
    for (std::int64_t layer = 0; layer < geometry.num_layers; ++layer) arena.ZeroTail(slot, layer, tokens);
  }
  return {};
}

void Leave(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot) {
  {
    const StateLock state = pool.table->Lock();
    pool.table->StartDraining(state, slot);
    pool.table->Vacate(state, slot);
  }
  pool.supply->SyncIndex(mapping);  // removes entries for tokens that the slot does not have
  static_cast<void>(pool.supply->Empty(mapping, slot));
}

}  // namespace kvpage::placing
