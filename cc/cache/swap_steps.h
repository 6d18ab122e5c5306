// The steps of a swapped sequence in one pool, each called with the pool's mapping mutex held: for a single pool
// (swapping.h) or for several joined pools at once (joint_swap.h).
#ifndef KVPAGE_CACHE_SWAP_STEPS_H_
#define KVPAGE_CACHE_SWAP_STEPS_H_

#include <cstdint>
#include <memory>

#include "cache/parts.h"
#include "cache/swap_table.h"

namespace kvpage::swapping::steps {

// Vacated: whether the release program of the sequence's slot has run. Idle: also that no handler or view uses the
// slot.
bool Vacated(const PoolParts& pool, const Swap& swap);
bool Idle(const PoolParts& pool, const Swap& swap);
// Collects the contents of a vacated slot: tokens, blocks, and how many blocks stay in memory because others use them.
void Find(const PoolParts& pool, const MappingLock& mapping, Swap* swap);
// Limits the collected contents to the first `tokens` tokens, and keeps at least `kept` blocks in memory.
void Limit(const PoolParts& pool, std::int64_t tokens, std::int64_t kept, Swap* swap);
// Takes the collected contents; the slot empties once it is unused. Returns whether some blocks must be written; that
// write then counts as started in the slot table.
bool Take(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap);
// Ends a write. Without an image the blocks stay in memory. `image` is null afterwards unless it is no longer wanted:
// the caller then destroys it without a lock, as that may take a while.
void EndWrite(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap,
              std::shared_ptr<store::SwapImage>* image);

// Claims blocks for the stored part. `read` tells how to fill them, except for its `done`; if it has no image there is
// nothing to read.
Claim StartRead(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap, store::SwapRead* read);
// Undoes StartRead if the read was not submitted.
void CancelRead(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap);
// Ends a read that restored the first `good` blocks. The sequence still has its image only if the read can be retried
// after a failure.
void EndRead(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap, store::Problem problem,
             std::int64_t good);

// Drops a sequence. `image` receives its stored part, which the caller destroys without a lock.
void Drop(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap,
          std::shared_ptr<store::SwapImage>* image);

}  // namespace kvpage::swapping::steps

#endif  // KVPAGE_CACHE_SWAP_STEPS_H_
