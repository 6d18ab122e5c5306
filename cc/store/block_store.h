// BlockStore: stores blocks of keys and values in files of one directory that several processes share.
//
// Lookups use an in-memory directory, which a thread of the store keeps up to date with the files, including those of
// other processes. Writers and readers also have threads: no call waits for a disk unless its comment says so. A file
// that is damaged, foreign or missing counts as not stored; a failed write loses only what it was to write. Calls are
// thread-safe. In a forked child the store is closed.
#ifndef KVPAGE_STORE_BLOCK_STORE_H_
#define KVPAGE_STORE_BLOCK_STORE_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/latencies.h"
#include "base/status.h"
#include "store/directory.h"
#include "store/file_header.h"
#include "store/file_io.h"
#include "store/prefix_store.h"
#include "store/read_ticket.h"
#include "store/swap_store.h"

namespace kvpage::store {

struct StoreOptions {
  std::int64_t limit_bytes = std::numeric_limits<std::int64_t>::max();  // of all files
  std::string fingerprint;                                              // of the model
  std::int64_t file_bytes = std::int64_t{64} << 20;                     // longer runs are split
  std::int64_t most_queued_bytes = std::int64_t{256} << 20;             // limit for runs waiting for a writer
  int writers = 2;
  int readers = 4;
  double refresh_seconds = 1;
  std::shared_ptr<FileIo> io;  // null: system calls
};

struct StoreNumbers {
  std::int64_t files = 0, bytes = 0, limit_bytes = 0;
  std::int64_t bytes_swapped = 0;  // in unnamed files
  std::int64_t lookups = 0, tokens_asked = 0, tokens_found = 0;
  std::int64_t bytes_written = 0, bytes_read = 0;
  std::int64_t blocks_written = 0, blocks_read = 0;
  double read_bytes_per_second = 0;    // of the latest requests, including queueing; 0: none yet
  LatencyNumbers swap_outs, swap_ins;  // from the call to completion
  std::int64_t bytes_queued = 0;
  std::int64_t runs_dropped = 0, bytes_dropped = 0;  // because the queue was full
  std::int64_t failed_writes = 0;
  std::int64_t files_evicted = 0, bytes_evicted = 0;
  std::vector<std::int64_t> refused;  // [kNumProblems]: current number of files that this store cannot use
  std::vector<std::int64_t> missed;   // [kNumProblems]: failed lookups and reads
  std::string last_error;             // of writes, listings and evictions
};

class BlockStore final : public SwapStore, public PrefixStore {
 public:
  // Scans the existing files before it returns.
  static Status Open(const std::string& path, StoreOptions options, std::unique_ptr<BlockStore>* out);
  ~BlockStore() override;

  const StoreOptions& options() const;
  Status Check(const char* op) const override;
  const char* place() const override { return "on disk"; }
  bool copies() const override { return false; }
  std::string Explain(Problem problem) const override { return std::string("a file is ") + Name(problem); }

  std::int64_t Find(const BlockShape& shape, const std::string& space, const std::int32_t* tokens,
                    std::int64_t count) override;
  std::int64_t StoredBlocks(const BlockShape& shape, const std::string& space,
                            const std::vector<std::int32_t>& tokens) override;
  // All files with blocks of this shape, parents first.
  std::vector<StoredRun> Runs(const BlockShape& shape);
  std::vector<StoredRun> Lost(const BlockShape& shape, std::int64_t* seen) override;

  // Does not write blocks that are already stored.
  bool Write(WriteRun& run) override;
  // Waits up to `seconds`; returns whether a run of this size fits in the queue.
  bool WaitForRoom(std::int64_t bytes, double seconds);

  // Starts a read; never returns null.
  std::shared_ptr<ReadTicket> Read(ReadRequest request);
  void Fetch(ReadRequest request) override { static_cast<void>(Read(std::move(request))); }
  double read_bytes_per_second() override;

  void WriteSwapped(SwapWrite write) override;
  void ReadSwapped(SwapRead read) override;
  void Watch(std::function<bool()> poll) override;

  // Scans for files of other processes now.
  Status Refresh();
  StoreNumbers Numbers();

  // Finishes reads and writes in progress and drops the others. Safe to call again.
  void Close();

 private:
  class Impl;
  explicit BlockStore(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_BLOCK_STORE_H_
