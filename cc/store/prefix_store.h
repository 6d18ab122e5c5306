// PrefixStore: where whole blocks of cached sequences go before they are evicted, and come back from, found by their
// tokens. A BlockStore has them in files, a HostTier in memory of the host.
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

// Copies blocks that the host cannot read where they lie. The store's thread calls it.
class BlockCopier {
 public:
  virtual ~BlockCopier() = default;
  virtual std::int64_t blocks() const = 0;
  // Copies blocks from the `begin`-th on to `to`, each [ranges, block_bytes].
  virtual Status Copy(std::int64_t begin, const std::vector<char*>& to) = 0;
  // Ends the copies, also after one that has failed: how many blocks, from the first one on, were the sequence's
  // throughout. Those behind may hold anything. Safe to call again.
  virtual std::int64_t End() = 0;
  // Memory of the host that copies reach directly.
  virtual Status MakeBuffer(std::int64_t bytes, HostBuffer* out) = 0;
};

// Consecutive blocks of one sequence that are to be written.
struct WriteRun {
  BlockShape shape;
  std::string space;
  std::vector<std::int32_t> tokens;  // from the beginning of the sequence to the end of the last block
  std::int64_t first_block = 0;
  std::vector<const char*> sources;     // [blocks, ranges]
  std::shared_ptr<BlockCopier> copier;  // in place of sources, for a store that copies
  std::shared_ptr<const void> keep;     // lives as long as the sources are needed
  // Called by the thread that is to write, if it is set: it sets what stands above, but for the shape, which is known
  // before. False: there is nothing to write, and `done` is not called.
  std::function<bool(WriteRun*)> fill = nullptr;
  // Called once a run that Write has taken is done with, by a thread of the store or by Close.
  std::function<void(const Status&)> done;
};

// Blocks from `begin` on that are to be read; the sequence's tokens say which.
struct ReadRequest {
  // Copies blocks to where they belong, from the `begin`-th of the request on.
  using PlaceBlocks = std::function<Status(std::int64_t begin, const std::vector<const char*>& from)>;

  BlockShape shape;
  std::string space;
  std::vector<std::int32_t> tokens;  // from the beginning of the sequence to the end of the last block
  std::int64_t begin = 0;
  std::vector<char*> destinations;   // [blocks, ranges]
  std::shared_ptr<const void> keep;  // lives as long as something may be read
  // Set by the caller: what has not begun is not read any more, and counts as kClosed.
  std::shared_ptr<const std::atomic<bool>> cancelled = nullptr;
  // Called once the read is done, with how many blocks from the first one on are there, and why not all: by a thread of
  // the store, by Close, or at once if there is nothing to read.
  std::function<void(std::int64_t blocks, Problem problem)> done = nullptr;
  PlaceBlocks place = nullptr;  // in place of destinations, for a store that copies
};

class PrefixStore {
 public:
  virtual ~PrefixStore() = default;

  // An error once the store is closed, or in a forked child.
  virtual Status Check(const char* op) const = 0;
  // Whether it is for pools whose blocks the host can neither read nor write where they lie.
  virtual bool copies() const = 0;
  // What a read that came to nothing has met, in words: "a file is damaged".
  virtual std::string Explain(Problem problem) const = 0;

  // How many of the tokens are stored, in whole blocks. Made in memory.
  virtual std::int64_t Find(const BlockShape& shape, const std::string& space, const std::int32_t* tokens,
                            std::int64_t count) = 0;
  // The same in blocks, for callers that are about to write: it does not count as a look-up.
  virtual std::int64_t StoredBlocks(const BlockShape& shape, const std::string& space,
                                    const std::vector<std::int32_t>& tokens) = 0;
  // Runs with blocks of this shape that are no longer there since the last call with the same `seen`, which begins with
  // 0; the latest ones if they are very many.
  virtual std::vector<StoredRun> Lost(const BlockShape& shape, std::int64_t* seen) = 0;

  // Takes a run to be written and does not wait. False: it is dropped, because the queue is full or the store closed;
  // it is left as it was.
  virtual bool Write(WriteRun& run) = 0;
  // Begins to read, and does not wait.
  virtual void Fetch(ReadRequest request) = 0;

  // Of the latest reads, with the time they were queued; 0: there were none.
  virtual double read_bytes_per_second() = 0;

  // The pool above ends: what nobody else can find goes. Safe to call again.
  virtual void Leave() {}
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_PREFIX_STORE_H_
