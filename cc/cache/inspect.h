// Inspection of a pool: numbers, the valid slot table, block maps.
#ifndef KVPAGE_CACHE_INSPECT_H_
#define KVPAGE_CACHE_INSPECT_H_

#include <cstdint>
#include <vector>

#include "cache/parts.h"

namespace kvpage::inspect {

PoolNumbers Numbers(const PoolParts& pool);
// The slots that are not free.
std::vector<SlotRow> Rows(const PoolParts& pool);
// See Arena::Audit.
Status Audit(const PoolParts& pool);
Status BlockMap(const PoolParts& pool, std::int32_t slot, BlockReferences* out);
// The same, with the slots that map each block.
Status BlockOwners(const PoolParts& pool, std::int32_t slot, BlockRows* out);
// Addresses and sizes of the mapped part of each range of a slot.
Status SlotMemory(const PoolParts& pool, std::int32_t slot, MemoryRanges* out);

}  // namespace kvpage::inspect

#endif  // KVPAGE_CACHE_INSPECT_H_
