// BlockStore: blocks of keys and values below memory, in files of one directory that processes share.
//
// Look-ups are made in memory, in a directory that a thread of the store keeps up to date with the files, those of
// other processes too. Writers and readers have threads as well: no call waits for a disk unless it says so. A file
// that is damaged, foreign, or gone counts as not stored; a failed write loses nothing but what it was to write. Calls
// may come from any thread. In a forked child the store is closed.
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
  std::int64_t file_bytes = std::int64_t{64} << 20;                     // a longer run is split
  std::int64_t most_queued_bytes = std::int64_t{256} << 20;             // runs that wait for a writer
  int writers = 2;
  int readers = 4;
  double refresh_seconds = 1;
  std::shared_ptr<FileIo> io;  // null: the system's
};

struct StoreNumbers {
  std::int64_t files = 0, bytes = 0, limit_bytes = 0;
  std::int64_t bytes_swapped = 0;  // in files without names
  std::int64_t lookups = 0, tokens_asked = 0, tokens_found = 0;
  std::int64_t bytes_written = 0, bytes_read = 0;
  std::int64_t blocks_written = 0, blocks_read = 0;
  double read_bytes_per_second = 0;    // of the latest requests, queueing included; 0: not measured yet
  LatencyNumbers swap_outs, swap_ins;  // from the call to completion
  std::int64_t bytes_queued = 0;
  std::int64_t runs_dropped = 0, bytes_dropped = 0;  // the queue was full
  std::int64_t failed_writes = 0;
  std::int64_t files_evicted = 0, bytes_evicted = 0;
  std::vector<std::int64_t> refused;  // [kNumProblems]: files that hold nothing for this store, now
  std::vector<std::int64_t> missed;   // [kNumProblems]: look-ups and reads that came to nothing
  std::string last_error;             // of a write, a listing or an eviction
};

class BlockStore final : public SwapStore, public PrefixStore {
 public:
  // Finds what is stored before it returns.
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
  // All files with blocks of this shape, those before that others continue.
  std::vector<StoredRun> Runs(const BlockShape& shape);
  std::vector<StoredRun> Lost(const BlockShape& shape, std::int64_t* seen) override;

  // Does not write blocks that are already stored.
  bool Write(WriteRun& run) override;
  // Whether a run of this size fits in the queue within some seconds.
  bool WaitForRoom(std::int64_t bytes, double seconds);

  // Begins to read; never null.
  std::shared_ptr<ReadTicket> Read(ReadRequest request);
  void Fetch(ReadRequest request) override { static_cast<void>(Read(std::move(request))); }
  double read_bytes_per_second() override;

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
