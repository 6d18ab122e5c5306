// BlockStore: blocks of keys and values below memory, in files of one directory that processes share.
//
// Look-ups are made in memory, in a directory that a thread of the store keeps up to date with the files, those of
// other processes too. Writers and readers have threads as well: no call waits for a disk unless it says so. A file
// that is damaged, foreign, or gone counts as not stored; a failed write loses nothing but what it was to write. Calls
// may come from any thread. In a forked child the store is closed.
#ifndef KVPAGE_STORE_BLOCK_STORE_H_
#define KVPAGE_STORE_BLOCK_STORE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "store/directory.h"
#include "store/file_header.h"
#include "store/file_io.h"
#include "store/read_ticket.h"
#include "store/swap_store.h"

namespace kvpage::store {

struct StoreOptions {
  std::int64_t limit_bytes = std::numeric_limits<std::int64_t>::max();  // of all files
  std::string fingerprint;                                              // of the model
  std::int64_t file_bytes = std::int64_t{64} << 20;                     // a longer run is split
  std::int64_t most_queued_bytes = std::int64_t{256} << 20;             // runs that wait for a writer
  int writers = 2;
  int readers = 4;
  double refresh_seconds = 1;
  std::shared_ptr<FileIo> io;  // null: the system's
};

// Consecutive blocks of one sequence that are to be written.
struct WriteRun {
  BlockShape shape;
  std::string space;
  std::vector<std::int32_t> tokens;  // from the beginning of the sequence to the end of the last block
  std::int64_t first_block = 0;
  std::vector<const char*> sources;  // [blocks, ranges]
  std::shared_ptr<const void> keep;  // lives as long as the sources are needed
  // Called by the thread that is to write, if it is set: it sets what stands above, but for the shape, which is known
  // before. False: there is nothing to write, and `done` is not called.
  std::function<bool(WriteRun*)> fill = nullptr;
  // Called once a run that Write has taken is done with, by a thread of the store or by Close.
  std::function<void(const Status&)> done;
};

// Blocks from `begin` on that are to be read; the sequence's tokens say which.
struct ReadRequest {
  BlockShape shape;
  std::string space;
  std::vector<std::int32_t> tokens;  // from the beginning of the sequence to the end of the last block
  std::int64_t begin = 0;
  std::vector<char*> destinations;   // [blocks, ranges]
  std::shared_ptr<const void> keep;  // lives as long as something may be read
  // Set by the caller: what has not begun is not read any more, and counts as kClosed.
  std::shared_ptr<const std::atomic<bool>> cancelled = nullptr;
  // Called once the ticket is ready, with what it says: by a thread of the store, by Close, or by Read if there is
  // nothing to read.
  std::function<void(std::int64_t blocks, Problem problem)> done = nullptr;
};

struct StoreNumbers {
  std::int64_t files = 0, bytes = 0, limit_bytes = 0;
  std::int64_t bytes_swapped = 0;  // in files without names
  std::int64_t lookups = 0, tokens_asked = 0, tokens_found = 0;
  std::int64_t bytes_written = 0, bytes_read = 0;
  std::int64_t blocks_written = 0, blocks_read = 0;
  double read_bytes_per_second = 0;  // of the latest requests, with the time they were queued; 0: not known yet
  std::int64_t bytes_queued = 0;
  std::int64_t runs_dropped = 0, bytes_dropped = 0;  // the queue was full
  std::int64_t failed_writes = 0;
  std::int64_t files_evicted = 0, bytes_evicted = 0;
  std::vector<std::int64_t> refused;  // [kNumProblems]: files that hold nothing for this store, now
  std::vector<std::int64_t> missed;   // [kNumProblems]: look-ups and reads that came to nothing
  std::string last_error;             // of a write, a listing or an eviction
};

class BlockStore final : public SwapStore {
 public:
  // Finds what is stored before it returns.
  static Status Open(const std::string& path, StoreOptions options, std::unique_ptr<BlockStore>* out);
  ~BlockStore() override;

  const StoreOptions& options() const;
  Status Check(const char* op) const override;
  const char* place() const override { return "on disk"; }

  // How many of the tokens are stored, in whole blocks.
  std::int64_t Find(const BlockShape& shape, const std::string& space, const std::int32_t* tokens, std::int64_t count);
  // The same in blocks, for callers that are about to write: it does not count as a look-up.
  std::int64_t StoredBlocks(const BlockShape& shape, const std::string& space, const std::vector<std::int32_t>& tokens);
  // All files with blocks of this shape, those before that others continue.
  std::vector<StoredRun> Runs(const BlockShape& shape);
  // Files with blocks of this shape that are no longer there since the last call with the same `seen`, which begins
  // with 0; the latest ones if they are very many.
  std::vector<StoredRun> Lost(const BlockShape& shape, std::int64_t* seen);

  // Takes a run to be written and does not wait. False: it is dropped, because the queue is full or the store closed;
  // it is left as it was. Blocks that are stored already are not written again.
  bool Write(WriteRun& run);
  // Whether a run of this size fits in the queue within some seconds.
  bool WaitForRoom(std::int64_t bytes, double seconds);

  // Begins to read; never null.
  std::shared_ptr<ReadTicket> Read(ReadRequest request);

  void WriteSwapped(SwapWrite write) override;
  void ReadSwapped(SwapRead read) override;
  void Watch(std::function<bool()> poll) override;

  // Looks for files of other processes now.
  Status Refresh();
  StoreNumbers Numbers();

  // Ends reads and writes that have begun, and drops the others. Safe to call again.
  void Close();

 private:
  class Impl;
  explicit BlockStore(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_BLOCK_STORE_H_
