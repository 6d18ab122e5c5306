// Spiller: writes blocks of parked sequences to the store below a pool before they are evicted, using the store's
// threads.
//
// It starts when a sequence parks or memory runs short, and stops when free and written blocks together reach a given
// share of the capacity: written blocks can be evicted at once. The next blocks to be evicted are written first. Blocks
// are copied before they are written, so nobody waits for the disk; those that the host cannot read are copied by the
// store (prefix_copies.h). Blocks evicted before they are written are lost.
#ifndef KVPAGE_CACHE_PREFIX_SPILL_H_
#define KVPAGE_CACHE_PREFIX_SPILL_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/latencies.h"
#include "cache/pool_access.h"
#include "store/prefix_store.h"
#include "vmm/block_mover.h"

namespace kvpage::prefix {

struct SpillNumbers {
  std::int64_t tokens = 0, bytes = 0;  // written so far
  double seconds = 0;                  // total of all writes
  LatencyNumbers latencies;            // of runs
  std::int64_t failed = 0;             // runs that could not be written
};

class Spiller : public std::enable_shared_from_this<Spiller> {
 public:
  // `share`: fraction of the pool's blocks that should be free or written. `mover`: for blocks that the host cannot
  // read, which the store copies itself; null if the host can read them.
  Spiller(std::shared_ptr<PoolAccess> access, store::PrefixStore* store, store::BlockShape shape, double share,
          std::shared_ptr<BlockMover> mover)
      : access_(std::move(access)), store_(*store), shape_(std::move(shape)), share_(share), mover_(std::move(mover)) {}

  // Called when there may be something to write. Never waits, and may be called with the pool's locks held.
  void Wake();
  // Stops starting new writes.
  void Close();
  SpillNumbers numbers() const;

 private:
  struct Run;

  // Queues a run that chooses its blocks when a store thread is ready for it.
  void Queue(const std::shared_ptr<Run>& run);
  // Returns whether there is something to write, and puts it in `write`.
  bool Fill(Run* run, store::WriteRun* write);
  // A single attempt of Fill. `again`: the chosen blocks need not be written or cannot be copied, so try again.
  bool Choose(const PoolParts& pool, Run* run, bool* again);
  // Copies the run's blocks up to `stop`, or creates the object that copies them.
  Status StartCopies(const PoolParts& pool, Run* run, std::int64_t stop);
  // Counts a failure and pauses further attempts for a while.
  void NoteFailure(const Status& status);
  // Limits the run to the first `blocks` full blocks of its sequence.
  void Shorten(const PoolParts& pool, Run* run, std::int64_t blocks) const;
  // Stops counting blocks as written that the store has lost.
  void NoteLost(const PoolParts& pool);
  // Whether less than the share is free or written.
  bool Wanted(const PoolParts& pool, const MappingLock& mapping, const PrefixIndex& index) const;
  void Done(const std::shared_ptr<Run>& run, const Status& status);
  // Reports to the index whether the run's blocks were written.
  void EndWrite(const PoolParts& pool, const Run& run, bool ok) const;

  const std::shared_ptr<PoolAccess> access_;
  store::PrefixStore& store_;
  const store::BlockShape shape_;
  const double share_;
  const std::shared_ptr<BlockMover> mover_;
  mutable std::mutex mutex_;  // acquired after the pool's locks
  int runs_ = 0;
  bool woken_ = false;
  std::int64_t lost_ = 0;  // value of `seen` for the store's Lost
  bool closed_ = false;
  std::chrono::steady_clock::time_point pause_;  // no run is started before this time
  SpillNumbers numbers_;
  Latencies latencies_;
};

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_PREFIX_SPILL_H_
