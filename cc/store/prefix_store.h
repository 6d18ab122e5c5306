// PrefixStore: stores full blocks of cached sequences that are about to be evicted, and restores them; they are found
// by their tokens. A BlockStore keeps them in files, a HostTier in host memory.
#ifndef KVPAGE_STORE_PREFIX_STORE_H_
#define KVPAGE_STORE_PREFIX_STORE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "store/directory.h"
#include "store/file_header.h"
#include "store/swap_store.h"

namespace kvpage::store {

// Copies blocks that the host cannot access directly. Called by the store's thread.
class BlockCopier {
 public:
  virtual ~BlockCopier() = default;
  virtual std::int64_t blocks() const = 0;
  // Copies blocks to `to`, each [ranges, block_bytes], starting at the `begin`-th.
  virtual Status Copy(std::int64_t begin, const std::vector<char*>& to) = 0;
  // Ends the copies, even after a failed one. Returns how many leading blocks held the sequence throughout; the other
  // copies may contain anything. Safe to call again.
  virtual std::int64_t End() = 0;
  // Allocates host memory that the device can copy to directly.
  virtual Status MakeBuffer(std::int64_t bytes, HostBuffer* out) = 0;
};

// Consecutive blocks of one sequence to be written.
struct WriteRun {
  BlockShape shape;
  std::string space;
  std::vector<std::int32_t> tokens;  // from the start of the sequence to the end of the last block
  std::int64_t first_block = 0;
  std::vector<const char*> sources;     // [blocks, ranges]
  std::shared_ptr<BlockCopier> copier;  // instead of sources, for a store that copies
  std::shared_ptr<const void> keep;     // keeps the sources alive
  // If set, the writing thread calls it to set the members above, except the shape, which is known in advance. If it
  // returns false there is nothing to write, and `done` is not called.
  std::function<bool(WriteRun*)> fill = nullptr;
  // Called when a run accepted by Write is finished, by a store thread or by Close.
  std::function<void(const Status&)> done;
};

// A request to read the blocks of a sequence from `begin` on, identified by its tokens.
struct ReadRequest {
  // Copies blocks to their destinations, starting at the `begin`-th of the request.
  using PlaceBlocks = std::function<Status(std::int64_t begin, const std::vector<const char*>& from)>;

  BlockShape shape;
  std::string space;
  std::vector<std::int32_t> tokens;  // from the start of the sequence to the end of the last block
  std::int64_t begin = 0;
  std::vector<char*> destinations;   // [blocks, ranges]
  std::shared_ptr<const void> keep;  // keeps the destinations alive
  // Set by the caller to skip reads that have not started; they count as kClosed.
  std::shared_ptr<const std::atomic<bool>> cancelled = nullptr;
  // Called when the read is done, with the number of leading blocks read and the reason if not all were: by a store
  // thread, by Close, or immediately if there is nothing to read.
  std::function<void(std::int64_t blocks, Problem problem)> done = nullptr;
  PlaceBlocks place = nullptr;  // instead of destinations, for a store that copies
};

class PrefixStore {
 public:
  virtual ~PrefixStore() = default;

  // Returns an error if the store is closed or this is a forked child.
  virtual Status Check(const char* op) const = 0;
  // Whether the store serves pools whose blocks the host cannot access directly.
  virtual bool copies() const = 0;
  // Describes why a read failed: "a file is damaged".
  virtual std::string Explain(Problem problem) const = 0;

  // The number of leading tokens that are stored, in full blocks. Looks in memory only.
  virtual std::int64_t Find(const BlockShape& shape, const std::string& space, const std::int32_t* tokens,
                            std::int64_t count) = 0;
  // The same in blocks, for callers about to write: does not count as a lookup.
  virtual std::int64_t StoredBlocks(const BlockShape& shape, const std::string& space,
                                    const std::vector<std::int32_t>& tokens) = 0;
  // Runs with blocks of this shape that were lost since the last call with the same `seen`, which is initially 0. If
  // there are very many, only the latest.
  virtual std::vector<StoredRun> Lost(const BlockShape& shape, std::int64_t* seen) = 0;

  // Queues a run for writing without waiting. Returns false, and leaves the run unchanged, if the queue is full or the
  // store is closed.
  virtual bool Write(WriteRun& run) = 0;
  // Starts a read without waiting.
  virtual void Fetch(ReadRequest request) = 0;

  // Throughput of the latest reads, queueing included; 0: none yet.
  virtual double read_bytes_per_second() = 0;

  // Called when the pool above ends: removes sequences that no other pool can find. Safe to call again.
  virtual void Leave() {}
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_PREFIX_STORE_H_
