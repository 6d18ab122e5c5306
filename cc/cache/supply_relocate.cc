// The part of Supply that moves single blocks: see relocation.h.
#include "cache/supply.h"

namespace kvpage {

// A block may be moved if nobody can write it while the mapping mutex is held: slots that map it for writing must be
// idle, and a slot gets an occupant only under that mutex. Occupied slots may read it, because their mapping shows the
// same bytes throughout. References that are not mappings belong to somebody who knows the block by its number.
Status Supply::MoveBlock(const MappingLock& lock, std::int32_t slot, const Arena::Place& at, std::int32_t from,
                         std::int32_t to, bool* moved) {
  *moved = false;
  const BlockPool& blocks = arena_->pool();
  if (blocks.free(from) || !blocks.free(to) || blocks.num_free() == 0) return {};
  if (blocks.backing(from) != Backing::kOwn) return {};  // in another file its place is fixed
  std::vector<std::int32_t> mappers, readers;
  if (slot >= 0) {
    if (at.logical < arena_->hole(slot) || at.logical >= arena_->blocks(slot)) return {};
    if (arena_->map(slot)[at.logical * table_->geometry().num_ranges() + at.range] != from) return {};
    mappers = arena_->Mappers(slot, at.range, at.logical);
  }
  const bool cached = blocks.cached(from);
  if (blocks.references(from) != static_cast<std::int32_t>(mappers.size()) || (mappers.empty() && !cached)) return {};
  if (cached && (blocks.entries(from) > 1 || !index_->IsIn(from))) return {};
  std::int64_t aliases = 0;
  {
    const StateLock state = table_->Lock();
    for (const std::int32_t mapper : mappers) {
      const bool writable = at.logical >= arena_->ReadOnlyBlocks(mapper);
      const bool idle = table_->host(state, mapper).idle();
      if (writable && !idle) return {};
      aliases += writable ? 0 : 1;
      if (!idle) readers.push_back(mapper);
    }
  }
  // Each may be split from its neighbours until these have been moved too.
  if (aliases > 0 && !PromiseAliases(lock, Arena::kSplits * aliases).ok()) return {};
  bool created = false;
  const Status status = arena_->Exchange(from, to, at, mappers, readers, &created);
  if (aliases > 0) static_cast<void>(PromiseAliases(lock, 0));
  KVPAGE_RETURN_IF_ERROR(status);
  if (cached) index_->ReplaceBlock(from, to);
  ReleaseHeld(lock);
  if (created && blocks.free(from)) arena_->Cool(from);  // so that as many free blocks have memory as before
  *moved = true;
  return {};
}

}  // namespace kvpage
