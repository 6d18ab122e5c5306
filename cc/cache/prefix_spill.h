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
  std::int64_t tokens = 0, bytes = 0;  // written
  double seconds = 0;                  // of all writes together
  LatencyNumbers latencies;            // of runs of blocks
  std::int64_t failed = 0;             // runs of blocks that could not be written
};

class Spiller : public std::enable_shared_from_this<Spiller> {
 public:
  // `share`: fraction of the pool's blocks that should be free or written. `mover`: for blocks that the host cannot
  // read, which the store copies itself; null if the host can read them.
  Spiller(std::shared_ptr<PoolAccess> access, store::PrefixStore* store, store::BlockShape shape, double share,
          std::shared_ptr<BlockMover> mover)
      : access_(std::move(access)), store_(*store), shape_(std::move(shape)), share_(share), mover_(std::move(mover)) {}

  // There may be something to write. Never waits, and may be called with the pool's locks held.
  void Wake();
  // Writes nothing from now on but what has begun.
  void Close();
  SpillNumbers numbers() const;

 private:
  struct Run;

  // Queues a run that chooses its blocks when a thread of the store has time for it.
  void Queue(const std::shared_ptr<Run>& run);
  // Whether there is something to write: it is in `write` then.
  bool Fill(Run* run, store::WriteRun* write);
  // The same for one attempt; `again`: what was chosen needs no writing, or cannot be copied.
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
  // The index hears how it went with the run's blocks.
  void EndWrite(const PoolParts& pool, const Run& run, bool ok) const;

  const std::shared_ptr<PoolAccess> access_;
  store::PrefixStore& store_;
  const store::BlockShape shape_;
  const double share_;
  const std::shared_ptr<BlockMover> mover_;
  mutable std::mutex mutex_;  // taken after the pool's
  int runs_ = 0;
  bool woken_ = false;
  std::int64_t lost_ = 0;  // files that the store had lost when it was last asked
  bool closed_ = false;
  std::chrono::steady_clock::time_point pause_;  // nothing is begun before
  SpillNumbers numbers_;
  Latencies latencies_;
};

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_PREFIX_SPILL_H_
