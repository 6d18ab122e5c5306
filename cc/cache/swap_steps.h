// The steps of a swapped sequence in one pool, each made with its mapping mutex held: by that pool alone (swapping.h),
// or in several pools at once (joint_swap.h).
#ifndef KVPAGE_CACHE_SWAP_STEPS_H_
#define KVPAGE_CACHE_SWAP_STEPS_H_

#include <cstdint>
#include <memory>

#include "cache/parts.h"
#include "cache/swap_table.h"

namespace kvpage::swapping::steps {

// Whether the release program of the sequence's slot has run; and whether no handler and no view uses the slot either.
bool Vacated(const PoolParts& pool, const Swap& swap);
bool Idle(const PoolParts& pool, const Swap& swap);
// Finds what a vacated slot has: tokens, blocks, and how many of these stay in memory because others have them too.
void Find(const PoolParts& pool, const MappingLock& mapping, Swap* swap);
// Only the first `tokens` of the tokens that were found, and at least `kept` blocks in memory.
void Limit(const PoolParts& pool, std::int64_t tokens, std::int64_t kept, Swap* swap);
// Takes what was found. The slot empties when nobody uses it any more. Returns whether some of it is to be written,
// which has begun then for the slot table.
bool Take(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap);
// A write has ended. Without an image the blocks stay in memory. `image` is null afterwards, unless it is not wanted
// any more: it ends without a lock then, as that may take a while.
void EndWrite(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap,
              std::shared_ptr<store::SwapImage>* image);

// Claims blocks for what is in the store. `read` says how to fill them, apart from its `done`; without an image there
// is nothing to read.
Claim StartRead(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap, store::SwapRead* read);
// The read was not begun.
void CancelRead(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap);
// A read has ended, which has brought the first `good` blocks. The sequence has its image only if that is to be read
// again after a failure.
void EndRead(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap, store::Problem problem,
             std::int64_t good);

// Gives a sequence up. `image`: what it has in the store, which ends without a lock.
void Drop(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap,
          std::shared_ptr<store::SwapImage>* image);

}  // namespace kvpage::swapping::steps

#endif  // KVPAGE_CACHE_SWAP_STEPS_H_
