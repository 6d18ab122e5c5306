// SwapTable: sequences that were swapped out (swapping.h), and the blocks that they still have in memory.
//
// Bookkeeping only, as the block pool's; supply's mapping mutex guards it.
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
  kQueued = 0,  // its slot drains: programs that were queued before have still to run
  kWriting,     // in memory; what no other slot has is being written
  kMemory,      // in memory, all of it
  kStored,      // what no other slot has is in the store
  kReading,     // blocks are claimed for that, and are being read
  kDamaged,     // some of it could not be read
  kGone,        // swapped in, or given up
};

// The parts of a sequence in several joined pools: see joint_swap.h.
class SwapGroup {
 public:
  virtual ~SwapGroup() = default;
  // The slot's release program has run in one of the pools. Call this without locks.
  virtual void Continue() = 0;
};

// A swapped sequence. The mapping mutex guards its fields, apart from those behind its own mutexes.
class Swap {
 public:
  // Its state is also for waiters, who hold no lock of the pool.
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
  // It is in the store, still or again. `error`: why the latest read has failed, which lost nothing.
  void SetStored(std::string error) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      state_ = SwapState::kStored;
      error_ = std::move(error);
    }
    changed_.notify_all();
  }
  // How many tokens it has: the committed ones, then, once its slot has drained, those that are written.
  std::int64_t tokens() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return tokens_;
  }
  void SetTokens(std::int64_t tokens) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tokens_ = tokens;
  }
  // Those that are in memory, from the first one on, when nothing is to be waited for.
  std::int64_t tokens_in_memory() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (state_ == SwapState::kDamaged) return recoverable_;
    return state_ == SwapState::kMemory || state_ == SwapState::kWriting ? tokens_ : 0;
  }
  // Why it could not be read the last time; "": nothing has failed.
  std::string error() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return error_;
  }
  // Whether nothing is to be waited for: within some seconds.
  bool Wait(double seconds) const {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                             [&] { return state_ != SwapState::kQueued && state_ != SwapState::kReading; });
  }

  // A thread of the store copies blocks while copy_mutex is held and this does not forbid it.
  void StopCopies() {
    const std::lock_guard<std::mutex> lock(copy_mutex);
    copies_stopped = true;
  }
  std::mutex copy_mutex;
  bool copies_stopped = false;

  std::int32_t slot = -1;         // that it had
  std::vector<std::int32_t> ids;  // of its tokens, once the slot has drained
  std::int32_t space = -1;        // see HostSlot
  std::int64_t prompt = 0;
  std::vector<std::int32_t> blocks;  // [logical blocks, ranges]; -1: in the store. Each has a reference of the swap's
  std::int64_t kept = 0;             // the first logical blocks, which stay in memory
  bool wanted = false;               // somebody waits for it: it is not to be written
  bool dropped = false;              // given up while blocks were being read
  std::weak_ptr<store::SwapStore> store;  // threads of the store may be the last to hold this
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
  // Those that are neither swapped in nor given up.
  const std::vector<SwapPtr>& swaps() const { return swaps_; }
  void Add(SwapPtr swap) { swaps_.push_back(std::move(swap)); }
  void Remove(const Swap* swap);
  // The swapped sequence whose slot is still draining; null: none.
  SwapPtr Queued(std::int32_t slot) const;
  SwapCounts& counts() { return counts_; }
  const SwapCounts& counts() const { return counts_; }

  // Every block that a swapped sequence has a reference to, once for each; `writing`: of those, the ones that come free
  // when they are written.
  struct Blocks {
    std::vector<std::int32_t> held, writing;
  };
  Blocks FindBlocks(std::int64_t ranges) const;
  // Physical blocks that come free when they are written.
  std::int64_t CountWriting(const Arena& arena) const;

 private:
  std::vector<SwapPtr> swaps_;
  SwapCounts counts_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_SWAP_TABLE_H_
