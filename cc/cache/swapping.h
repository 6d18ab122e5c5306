// Swapping: a sequence leaves its slot for a while. Blocks that other slots share stay in memory, with a reference of
// the swapped sequence; the others are written to a store and then become free.
//
// The contents of a swapped sequence are determined when its slot's release program runs, not before: programs queued
// earlier may still write, or replace blocks (truncate). Store threads then begin to write, and no program or host call
// waits for them. If the disk is full, or if the sequence is wanted again first, nothing is lost: the blocks stay in
// memory until all of them are in the store. On CPU the release program starts the write when it runs; on a device a
// store thread polls the mirror, and calls that need the sequence check the mirror themselves.
#ifndef KVPAGE_CACHE_SWAPPING_H_
#define KVPAGE_CACHE_SWAPPING_H_

#include <cstdint>
#include <memory>

#include "base/slot_edits.h"
#include "cache/parts.h"
#include "cache/swap_table.h"

namespace kvpage::swapping {

// ---- host ----
// The slot begins to drain. `owner` keeps the pool's memory alive. The program to be queued is a release.
Status Out(const PoolParts& pool, std::int32_t slot, const std::shared_ptr<store::SwapStore>& store,
           std::weak_ptr<const void> owner, SwapPtr* out);
// Called if the release program was not queued. The caller makes the slot occupied again.
void UndoOut(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot);
// Brings a sequence back into memory: claims blocks and begins to read. Does nothing if it is in memory.
Claim Prefetch(const PoolParts& pool, const SwapPtr& swap);
// Maps a sequence that is in memory into a slot. claim.slots and claim.tokens are the slot and the length. `recover`:
// if the sequence could not be read completely, uses the leading tokens that are available.
Claim In(const PoolParts& pool, const SwapPtr& swap, bool recover);
// Called if the program that occupies the slot was not queued: the sequence is swapped out again.
void UndoIn(const PoolParts& pool, const SwapPtr& swap, std::int32_t slot);
// Drops a swapped sequence; does nothing if it was already dropped or swapped in.
void Drop(const PoolParts& pool, const SwapPtr& swap);
// Drops all of them.
void DropAll(const PoolParts& pool);

// ---- programs ----
// Continues with sequences whose slots' release programs have run. Call this without locks after such a program
// (`list`), or when a generation has begun.
void Continue(const PoolParts& pool);
void Continue(const PoolParts& pool, const EditList& list);
// With a mirror: the same, for release programs that have run by now. Call it without locks.
void Poll(const PoolParts& pool);

}  // namespace kvpage::swapping

#endif  // KVPAGE_CACHE_SWAPPING_H_
