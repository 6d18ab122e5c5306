// Swapping: a sequence leaves its slot for a while. Blocks that other slots share stay in memory, with a reference of
// the swapped sequence; the others are written to a store and then come free.
//
// What a swapped sequence has is decided when its slot's release program runs, not before: programs that were queued
// before may still write, or exchange blocks (truncate). Writing begins then, by threads of the store, and no program
// and no host call waits for it. It ends without a loss when the disk is full, or when the sequence is wanted again
// before: the blocks are in memory until all of them are in the store. On CPU the release program begins it as it runs;
// on a device a thread of the store polls the mirror, and calls that need the sequence look themselves.
#ifndef KVPAGE_CACHE_SWAPPING_H_
#define KVPAGE_CACHE_SWAPPING_H_

#include <cstdint>
#include <memory>

#include "base/slot_edits.h"
#include "cache/parts.h"
#include "cache/swap_table.h"

namespace kvpage::swapping {

// ---- host ----
// The slot begins to drain. `owner` keeps the pool's memory. The queued program is a release.
Status Out(const PoolParts& pool, std::int32_t slot, const std::shared_ptr<store::SwapStore>& store,
           std::weak_ptr<const void> owner, SwapPtr* out);
// The release program was not queued. The slot goes on as it was; the caller sees to that.
void UndoOut(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot);
// Brings a sequence back into memory: claims blocks and begins to read. Nothing happens if it is there.
Claim Prefetch(const PoolParts& pool, const SwapPtr& swap);
// Maps a sequence that is in memory into a slot. claim.slots and claim.tokens say which, and how long it is. `recover`:
// of one that could not be read, the first tokens that are there.
Claim In(const PoolParts& pool, const SwapPtr& swap, bool recover);
// The program that occupies the slot was not queued: the sequence is swapped out again.
void UndoIn(const PoolParts& pool, const SwapPtr& swap, std::int32_t slot);
// Gives a swapped sequence up; nothing happens if that is done, or it was swapped in.
void Drop(const PoolParts& pool, const SwapPtr& swap);
// The same for all.
void DropAll(const PoolParts& pool);

// ---- programs ----
// Goes on with sequences whose slots' release programs have run: call this without locks after such a program
// (`list`), or when a generation has begun.
void Continue(const PoolParts& pool);
void Continue(const PoolParts& pool, const EditList& list);
// With a mirror: the same for release programs that have run by now. Call it without locks.
void Poll(const PoolParts& pool);

}  // namespace kvpage::swapping

#endif  // KVPAGE_CACHE_SWAPPING_H_
