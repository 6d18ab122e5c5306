// SwapTable: sequences that were swapped out (swapping.h), and the blocks that they still have in memory.
//
// Bookkeeping only, like the block pool; supply's mapping mutex guards it.
#ifndef KVPAGE_CACHE_SWAP_TABLE_H_
#define KVPAGE_CACHE_SWAP_TABLE_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cache/arena.h"
#include "cache/types.h"
#include "store/swap_store.h"

namespace kvpage {

enum class SwapState : std::int8_t {
  kQueued = 0,  // its slot is draining: programs queued earlier still have to run
  kWriting,     // in memory; the blocks that no other slot has are being written
  kMemory,      // completely in memory
  kStored,      // the blocks that no other slot has are in the store
  kReading,     // blocks have been claimed for the stored part and are being read
  kDamaged,     // some of it could not be read
  kGone,        // swapped in or dropped
};

// The parts of a sequence in several joined pools: see joint_swap.h.
class SwapGroup {
 public:
  virtual ~SwapGroup() = default;
  // Called without locks when the slot's release program has run in one of the pools.
  virtual void Continue() = 0;
};

// A swapped sequence. The mapping mutex guards all fields that are not guarded by a mutex of this class.
class Swap {
 public:
  // The state can also be read by waiters that hold no lock of the pool.
  SwapState state() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return state_;
  }
  void SetState(SwapState state) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      state_ = state;
    }
    changed_.notify_all();
  }
  void SetDamaged(std::int64_t recoverable, std::string error) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      state_ = SwapState::kDamaged;
      recoverable_ = recoverable;
      error_ = std::move(error);
    }
    changed_.notify_all();
  }
  // It is still, or again, in the store. `error`: why the latest read failed, without losing anything.
  void SetStored(std::string error) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      state_ = SwapState::kStored;
      error_ = std::move(error);
    }
    changed_.notify_all();
  }
  // Its number of tokens: first the committed ones; once its slot has drained, those that are written.
  std::int64_t tokens() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return tokens_;
  }
  void SetTokens(std::int64_t tokens) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tokens_ = tokens;
  }
  // Its leading tokens that are in memory, if no work is pending.
  std::int64_t tokens_in_memory() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (state_ == SwapState::kDamaged) return recoverable_;
    return state_ == SwapState::kMemory || state_ == SwapState::kWriting ? tokens_ : 0;
  }
  // Why the latest read failed; "" if it did not.
  std::string error() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return error_;
  }
  // Waits up to `seconds` for pending work; returns whether it is done.
  bool Wait(double seconds) const {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                             [&] { return state_ != SwapState::kQueued && state_ != SwapState::kReading; });
  }

  // A store thread copies blocks while it holds copy_mutex, unless this forbids it.
  void StopCopies() {
    const std::lock_guard<std::mutex> lock(copy_mutex);
    copies_stopped = true;
  }
  std::mutex copy_mutex;
  bool copies_stopped = false;

  std::int32_t slot = -1;         // the slot it had
  std::vector<std::int32_t> ids;  // ids of its tokens, once the slot has drained
  std::int32_t space = -1;        // see HostSlot
  std::int64_t prompt = 0;
  std::vector<std::int32_t> blocks;  // [logical blocks, ranges]; -1: in the store. The swap holds a reference to each
  std::int64_t kept = 0;             // number of leading logical blocks that stay in memory
  bool wanted = false;               // somebody is waiting for it, so it should not be written
  bool dropped = false;              // was dropped while blocks were being read
  std::weak_ptr<store::SwapStore> store;  // weak, because store threads may be the last to hold this object
  std::weak_ptr<const void> pool;         // keeps the memory while the store uses it
  std::shared_ptr<store::SwapImage> image;
  bool in_group = false;  // changes state only together with its parts in other pools
  std::weak_ptr<SwapGroup> group;

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  SwapState state_ = SwapState::kQueued;
  std::int64_t tokens_ = 0, recoverable_ = 0;
  std::string error_;
};
using SwapPtr = std::shared_ptr<Swap>;

class SwapTable {
 public:
  // All that are neither swapped in nor dropped.
  const std::vector<SwapPtr>& swaps() const { return swaps_; }
  void Add(SwapPtr swap) { swaps_.push_back(std::move(swap)); }
  void Remove(const Swap* swap);
  // The swapped sequence whose slot is still draining, or null.
  SwapPtr Queued(std::int32_t slot) const;
  SwapCounts& counts() { return counts_; }
  const SwapCounts& counts() const { return counts_; }

  // All blocks to which swapped sequences have references, once for each reference; `writing`: of these, the blocks
  // that become free when they are written.
  struct Blocks {
    std::vector<std::int32_t> held, writing;
  };
  Blocks FindBlocks(std::int64_t ranges) const;
  // Number of physical blocks that become free when they are written.
  std::int64_t CountWriting(const Arena& arena) const;

 private:
  std::vector<SwapPtr> swaps_;
  SwapCounts counts_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_SWAP_TABLE_H_
