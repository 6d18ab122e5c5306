// Spiller: blocks of parked sequences are written to the store below a pool before they are evicted, by the store's
// threads.
//
// It begins when a sequence parks, or memory runs short, and ends when free and written blocks together are a share of
// the capacity: written blocks can be evicted at once. The blocks that would be evicted next are written first. Blocks
// are copied before they are written, so nobody waits for the disk; those that the host cannot read are copied by the
// store (prefix_copies.h). What is evicted before it is written is lost.
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
  // `share`: of the pool's blocks, those that are to be free or written.
  // `mover`: of blocks that the host cannot read, which the store copies itself; null: the host can.
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
  // Copies the run's blocks up to `stop`, or makes what copies them.
  Status StartCopies(const PoolParts& pool, Run* run, std::int64_t stop);
  // Nothing is tried for a while.
  void NoteFailure(const Status& status);
  // The run ends behind `blocks` whole blocks of its sequence.
  void Shorten(const PoolParts& pool, Run* run, std::int64_t blocks) const;
  // Blocks that the store has lost no longer count as written.
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
