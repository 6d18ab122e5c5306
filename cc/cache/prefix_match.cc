#include "cache/prefix_match.h"

namespace kvpage::prefix {

bool Written(const PoolParts& pool, const StateLock& state, std::int32_t owner, std::int64_t tokens) {
  if (owner < 0 || pool.table->host(state, owner).state == SlotState::kFree) return true;
  // What programs on a device have written is unknown until their slot is released.
  return pool.mirror == nullptr && pool.table->progress(state).WrittenInAllLayers(owner) >= tokens;
}

Hit FindHit(const PoolParts& pool, const MappingLock& mapping, std::int32_t space, const std::int32_t* ids,
            std::int64_t limit) {
  const SlotTable& table = *pool.table;
  const Geometry& geometry = table.geometry();
  const Arena& arena = pool.supply->arena(mapping);
  const std::int64_t block_tokens = geometry.block_tokens, ranges = geometry.num_ranges();
  const PrefixMatch match = pool.supply->OpenIndex(mapping).Find(space, ids, limit);
  const StateLock state = table.Lock();
  for (std::int64_t tokens = match.tokens; tokens > 0;) {
    Hit hit;
    hit.tokens = tokens;
    const std::int64_t blocks = geometry.BlocksFor(tokens);
    const std::int32_t owner = match.owners[blocks - 1];
    if (owner >= 0 && table.host(state, owner).state != SlotState::kFree) {
      // The forking program checks that the donor has written the tokens. A draining slot may be gone by then.
      const HostSlot& row = table.host(state, owner);
      if (row.state == SlotState::kOccupied && static_cast<std::int64_t>(row.committed.size()) >= tokens) {
        hit.kind = Hit::kFork;
        hit.source = owner;
        return hit;
      }
      tokens = (blocks - 1) * block_tokens;
      continue;
    }
    hit.kind = Hit::kAlias;
    hit.slot = owner;
    if (owner >= 0 && arena.blocks(owner) >= blocks) {
      // All blocks of a free slot's own sequence are written.
      hit.blocks.assign(arena.map(owner), arena.map(owner) + blocks * ranges);
      return hit;
    }
    std::int64_t known = 0;  // number of leading blocks that are written
    while (known < blocks - 1 && Written(pool, state, match.owners[known], (known + 1) * block_tokens)) ++known;
    if (known == blocks - 1) {
      hit.blocks.assign(match.blocks.begin(), match.blocks.begin() + blocks * ranges);
      return hit;
    }
    tokens = known * block_tokens;
  }
  return {};
}

}  // namespace kvpage::prefix
