// HostPrefixes: blocks of cached sequences in memory of the host, for pools on a device.
//
// They are in runs of consecutive blocks, as a BlockStore has them in files, in the same directory (directory.h). Where
// the limit is reached the runs that were used least recently go, but none before those that continue it; swapped
// sequences take the room of runs too. A pool finds its own sequences only: the store does not know whose model's they
// are. Copies are made by threads of the store, one for each direction, which start with the first use; no lock is held
// meanwhile.
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
  double read_bytes_per_second = 0;  // of the latest reads, with the time they were queued; 0: none yet
  std::int64_t bytes_evicted = 0;
  std::int64_t refused_writes = 0;  // they did not fit
  std::int64_t failed_writes = 0, failed_reads = 0;
  std::string last_error;
};

class HostPrefixes {
 public:
  explicit HostPrefixes(std::shared_ptr<HostMemory> memory);
  ~HostPrefixes();
  HostPrefixes(const HostPrefixes&) = delete;
  HostPrefixes& operator=(const HostPrefixes&) = delete;

  // A name for a pool, whose sequences stay until Forget.
  std::string NewOwner();
  void Forget(const std::string& owner);

  // See PrefixStore. The fingerprint of an identity is the owner's name.
  std::int64_t StoredBlocks(const Identity& identity, const std::int32_t* tokens, std::int64_t count) const;
  std::vector<StoredRun> Lost(const BlockShape& shape, const std::string& owner, std::int64_t* seen) const;
  bool Write(const std::string& owner, WriteRun& run);
  void Read(const std::string& owner, ReadRequest request);

  // Removes runs until `bytes` more fit within the limit, but none of `kept`, nor those that are being read, nor what
  // these continue. False: they do not fit; nothing is removed if they could not.
  bool MakeRoom(std::int64_t bytes, const std::set<std::string>& kept = {});
  HostPrefixNumbers Numbers() const;
  double read_bytes_per_second() const;
  // Ends copies that have begun, drops the others, and gives the memory back. Safe to call again.
  void Stop();

 private:
  // Its blocks, each [ranges, block_bytes].
  struct Run;
  struct WriteOrder {
    std::string owner;
    WriteRun run;
  };
  struct ReadOrder;

  void WorkOn(WriteOrder& order);
  Status Store(const WriteOrder& order);
  // The blocks of a run whose room there is.
  Status Fill(const WriteRun& run, std::int64_t skipped, std::shared_ptr<Run>* out);
  Status AddRun(const Identity& identity, const WriteRun& run, std::int64_t first_block,
                const std::shared_ptr<Run>& blocks);
  void WorkOn(ReadOrder& order);
  std::shared_ptr<Run> Take(const std::string& name);
  void NoteError(const Status& status, std::int64_t HostPrefixNumbers::* count);

  const std::shared_ptr<HostMemory> memory_;
  std::mutex queues_mutex_;  // taken before mutex_
  bool stopped_ = false;
  std::unique_ptr<WorkQueue<WriteOrder>> writes_;
  std::unique_ptr<WorkQueue<ReadOrder>> reads_;

  mutable std::mutex mutex_;
  Directory directory_;
  std::map<std::string, std::shared_ptr<Run>> runs_;
  std::set<std::string> owners_;
  std::int64_t num_owners_ = 0, num_runs_ = 0;  // so far
  double uses_ = 0;                             // a clock
  LostRuns lost_;
  HostPrefixNumbers numbers_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_HOST_PREFIXES_H_
