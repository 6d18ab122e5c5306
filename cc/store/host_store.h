// HostStore: blocks of swapped sequences and of evicted prefixes (host_prefixes.h) in host memory. Meant for pools on a
// device.
//
// A swapped sequence that does not fit within the limit is rejected and stays in the pool. Copies are made by two store
// threads, one per direction, which start on first use. In a forked child the store is closed.
#ifndef KVPAGE_STORE_HOST_STORE_H_
#define KVPAGE_STORE_HOST_STORE_H_

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "base/latencies.h"
#include "base/status.h"
#include "store/host_memory.h"
#include "store/host_prefixes.h"
#include "store/swap_store.h"
#include "store/watcher.h"
#include "store/work_queue.h"

namespace kvpage::store {

struct HostNumbers {
  std::int64_t limit_bytes = 0, used_bytes = 0, pinned_bytes = 0;
  // For swapped sequences:
  std::int64_t bytes_written = 0, bytes_read = 0;
  double read_bytes_per_second = 0;  // of the latest reads, including queueing; 0: none yet
  std::int64_t refused_writes = 0;   // did not fit
  std::int64_t failed_writes = 0, failed_reads = 0;
  std::string last_error;
  LatencyNumbers swap_outs, swap_ins;  // from the call to completion
  HostPrefixNumbers prefixes;
};

class HostStore final : public SwapStore {
 public:
  explicit HostStore(std::int64_t limit_bytes);
  ~HostStore() override;
  HostStore(const HostStore&) = delete;
  HostStore& operator=(const HostStore&) = delete;

  Status Check(const char* op) const override;
  const char* place() const override { return "in host memory"; }
  void WriteSwapped(SwapWrite write) override;
  void ReadSwapped(SwapRead read) override;
  void Watch(std::function<bool()> poll) override;

  // Whether this process created the store. In a forked child its prefixes must not be touched.
  bool here() const;
  HostPrefixes& prefixes() const { return *prefixes_; }

  HostNumbers Numbers() const;
  // Finishes copies in progress and drops the others. Safe to call again.
  void Close();

 private:
  class Image;

  void WorkOn(SwapWrite& write);
  Status Fill(const SwapWrite& write, std::shared_ptr<SwapImage>* out);
  void WorkOn(SwapRead& read);
  void NoteError(const Status& status, std::int64_t HostNumbers::* count);

  const pid_t process_;
  const std::shared_ptr<HostMemory> memory_;
  std::unique_ptr<HostPrefixes> prefixes_;
  std::atomic<bool> closed_{false};
  std::mutex queues_mutex_, join_mutex_;
  std::unique_ptr<WorkQueue<SwapWrite>> writes_;
  std::unique_ptr<WorkQueue<SwapRead>> reads_;
  std::unique_ptr<Watcher> watcher_;
  mutable std::mutex numbers_mutex_;
  HostNumbers numbers_;
  Latencies swap_outs_, swap_ins_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_HOST_STORE_H_
