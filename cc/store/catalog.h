// Catalog: keeps the directory of a store (directory.h) in sync with its folder, and collects statistics about both.
#ifndef KVPAGE_STORE_CATALOG_H_
#define KVPAGE_STORE_CATALOG_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "base/latencies.h"
#include "store/block_store.h"
#include "store/directory.h"
#include "store/folder.h"
#include "store/lost_runs.h"

namespace kvpage::store {

class Catalog {
 public:
  Catalog(Folder folder, const StoreOptions& options);

  const Folder& folder() const { return folder_; }
  Identity MakeIdentity(const BlockShape& shape, const std::string& space) const {
    return {shape, options_.fingerprint, space};
  }

  std::vector<StoredPart> Find(const Identity& identity, const std::int32_t* tokens, std::int64_t count) const;
  // The same for a caller that asks what is stored; counts as a lookup.
  std::int64_t LookUp(const Identity& identity, const std::int32_t* tokens, std::int64_t count);
  std::vector<StoredRun> Runs(const BlockShape& shape) const;
  // See BlockStore.
  std::vector<StoredRun> Lost(const BlockShape& shape, std::int64_t* seen) const;

  // Records a file that was written.
  void Add(const std::string& name, std::int64_t bytes, const FileHeader& header);
  // Records a failed read; the problem with the file is known.
  void NoteProblem(const std::string& name, Problem problem);
  // Updates the statistics while holding the lock.
  template <class Change>
  void Count(const Change& change) {
    const std::lock_guard<std::mutex> lock(mutex_);
    change(&numbers_);
  }
  void NoteError(const Status& status);
  // Records that a request for this many bytes was read in this time.
  void NoteRead(std::int64_t bytes, double seconds);
  double read_bytes_per_second() const;
  // Records a completed swap-out (or swap-in) and its duration.
  void NoteSwapOut(double seconds);
  void NoteSwapIn(double seconds);

  // Reserves space within the limit for data that only this process has on disk; it takes precedence over block files.
  // Returns false if there is not enough. A negative number returns space.
  bool ReserveSwapped(std::int64_t bytes);

  // Updates the directory from the folder, if that has changed or with `force`.
  Status Refresh(bool force);
  // Removes files until at most `limit` bytes are left, including those counted by ReserveSwapped, but none of `kept`
  // and none that these continue. Returns true if at most `limit` bytes are left, or if another process is removing
  // files.
  bool Evict(std::int64_t limit, const std::set<std::string>& kept = {});
  // Periodic work of the store's thread.
  void Maintain();
  StoreNumbers Numbers() const;

 private:
  using Clock = std::chrono::steady_clock;

  // Whether files may have been added or removed since the last listing; `time` is the folder's current time.
  bool Changed(double* time) const;
  // Whether to try files again that the system refused to read, for example because no descriptors were left.
  bool Retries() const;
  // Whether a file is in the directory and need not be opened again.
  bool Usable(const std::string& name) const;
  std::int64_t bytes() const;  // including swapped data
  // Called before a file becomes unusable.
  void NoteLost(const std::string& name);

  const Folder folder_;
  const StoreOptions& options_;
  std::mutex refresh_mutex_;                                          // taken before mutex_
  std::map<std::string, std::uint64_t> inodes_;                       // of the files found by the latest refresh
  double changed_ = -1;                                               // the folder's time at the last listing
  Clock::time_point listed_;                                          // when that was
  std::int64_t rounds_ = 0;                                           // number of calls of Maintain
  std::atomic<Clock::time_point> next_listing_{Clock::time_point()};  // limits how often the folder is listed

  mutable std::mutex mutex_;
  Directory directory_;
  LostRuns lost_;
  StoreNumbers numbers_;
  std::int64_t swapped_bytes_ = 0;
  double recent_bytes_ = 0, recent_seconds_ = 0;  // of reads, with older ones weighted less
  Latencies swap_outs_, swap_ins_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_CATALOG_H_
