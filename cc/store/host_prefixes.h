// HostPrefixes: blocks of cached sequences in host memory, for pools on a device.
//
// They are stored as runs of consecutive blocks, indexed by the same directory (directory.h) that BlockStore uses for
// files. At the limit the least recently used runs are evicted, but never before the runs that continue them; swapped
// sequences may also displace runs. A pool finds only its own sequences, because the store does not know which model
// they come from. Copies are made by two store threads, one per direction, which start on first use; no lock is held
// during a copy.
#ifndef KVPAGE_STORE_HOST_PREFIXES_H_
#define KVPAGE_STORE_HOST_PREFIXES_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "base/status.h"
#include "store/directory.h"
#include "store/host_memory.h"
#include "store/lost_runs.h"
#include "store/prefix_store.h"
#include "store/work_queue.h"

namespace kvpage::store {

struct HostPrefixNumbers {
  std::int64_t runs = 0, bytes = 0;
  std::int64_t bytes_written = 0, bytes_read = 0;
  double read_bytes_per_second = 0;  // of the latest reads, queueing included; 0: none yet
  std::int64_t bytes_evicted = 0;
  std::int64_t refused_writes = 0;  // did not fit
  std::int64_t failed_writes = 0, failed_reads = 0;
  std::string last_error;
};

class HostPrefixes {
 public:
  explicit HostPrefixes(std::shared_ptr<HostMemory> memory);
  ~HostPrefixes();
  HostPrefixes(const HostPrefixes&) = delete;
  HostPrefixes& operator=(const HostPrefixes&) = delete;

  // Returns a new owner name for a pool. Its sequences are kept until Forget.
  std::string NewOwner();
  void Forget(const std::string& owner);

  // See PrefixStore. The fingerprint of an identity is the owner's name.
  std::int64_t StoredBlocks(const Identity& identity, const std::int32_t* tokens, std::int64_t count) const;
  std::vector<StoredRun> Lost(const BlockShape& shape, const std::string& owner, std::int64_t* seen) const;
  bool Write(const std::string& owner, WriteRun& run);
  void Read(const std::string& owner, ReadRequest request);

  // Evicts runs until `bytes` more fit within the limit, but no run in `kept`, no run being read, and no run that
  // either of these continues. If not enough can be evicted, returns false and evicts nothing.
  bool MakeRoom(std::int64_t bytes, const std::set<std::string>& kept = {});
  HostPrefixNumbers Numbers() const;
  double read_bytes_per_second() const;
  // Finishes copies in progress, drops queued ones, and frees the memory. Safe to call again.
  void Stop();

 private:
  // The blocks of a run, each [ranges, block_bytes].
  struct Run;
  struct WriteOrder {
    std::string owner;
    WriteRun run;
  };
  struct ReadOrder;

  void WorkOn(WriteOrder& order);
  Status Store(const WriteOrder& order);
  // Copies a run's blocks from the `skipped`-th on into host memory, which must have room for them.
  Status Fill(const WriteRun& run, std::int64_t skipped, std::shared_ptr<Run>* out);
  Status AddRun(const Identity& identity, const WriteRun& run, std::int64_t first_block,
                const std::shared_ptr<Run>& blocks);
  void WorkOn(ReadOrder& order);
  std::shared_ptr<Run> Take(const std::string& name);
  void NoteError(const Status& status, std::int64_t HostPrefixNumbers::* count);

  const std::shared_ptr<HostMemory> memory_;
  std::mutex queues_mutex_;  // acquired before mutex_
  bool stopped_ = false;
  std::unique_ptr<WorkQueue<WriteOrder>> writes_;
  std::unique_ptr<WorkQueue<ReadOrder>> reads_;

  mutable std::mutex mutex_;
  Directory directory_;
  std::map<std::string, std::shared_ptr<Run>> runs_;
  std::set<std::string> owners_;
  std::int64_t num_owners_ = 0, num_runs_ = 0;  // counters for names
  double uses_ = 0;                             // logical clock for LRU
  LostRuns lost_;
  HostPrefixNumbers numbers_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_HOST_PREFIXES_H_
