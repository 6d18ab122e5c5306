// Catalog: the directory of a store (directory.h) and its folder, kept equal; and the counts of what happens to both.
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
  // The same for a caller that asks what is stored: it is counted.
  std::int64_t LookUp(const Identity& identity, const std::int32_t* tokens, std::int64_t count);
  std::vector<StoredRun> Runs(const BlockShape& shape) const;
  // See BlockStore.
  std::vector<StoredRun> Lost(const BlockShape& shape, std::int64_t* seen) const;

  // A file was written.
  void Add(const std::string& name, std::int64_t bytes, const FileHeader& header);
  // A read came to nothing; what is wrong with the file is known by now.
  void NoteProblem(const std::string& name, Problem problem);
  // Changes the counts under the lock.
  template <class Change>
  void Count(const Change& change) {
    const std::lock_guard<std::mutex> lock(mutex_);
    change(&numbers_);
  }
  void NoteError(const Status& status);
  // A request for this many bytes was read in some seconds.
  void NoteRead(std::int64_t bytes, double seconds);
  double read_bytes_per_second() const;
  // Records a completed swap-out (or swap-in) and its duration.
  void NoteSwapOut(double seconds);
  void NoteSwapIn(double seconds);

  // Makes room below the limit for what only this process has on disk, before block files, and counts it; false: there
  // is not enough. A negative number gives it back.
  bool ReserveSwapped(std::int64_t bytes);

  // Makes the directory equal to the folder, if that has changed or `force`.
  Status Refresh(bool force);
  // Removes files until at most `limit` bytes are left with what ReserveSwapped has counted, but none of `kept` nor
  // what those continue. Returns whether at most `limit` bytes are left, or another process is removing files.
  bool Evict(std::int64_t limit, const std::set<std::string>& kept = {});
  // What the store's thread does from time to time.
  void Maintain();
  StoreNumbers Numbers() const;

 private:
  using Clock = std::chrono::steady_clock;

  // Whether files may have come or gone since the last listing; `time` is the folder's now.
  bool Changed(double* time) const;
  // Whether a file is in the directory and need not be opened again.
  bool Usable(const std::string& name) const;
  std::int64_t bytes() const;  // with swapped ones
  // A file is about to be of no use.
  void NoteLost(const std::string& name);

  const Folder folder_;
  const StoreOptions& options_;
  std::mutex refresh_mutex_;                                          // taken before mutex_
  std::map<std::string, std::uint64_t> inodes_;                       // of the files that the last refresh found
  double changed_ = -1;                                               // the folder's time at the last listing
  std::int64_t rounds_ = 0;                                           // of Maintain
  std::atomic<Clock::time_point> next_listing_{Clock::time_point()};  // not before this, to keep the limit

  mutable std::mutex mutex_;
  Directory directory_;
  LostRuns lost_;
  StoreNumbers numbers_;
  std::int64_t swapped_bytes_ = 0;
  double recent_bytes_ = 0, recent_seconds_ = 0;  // of reads, older ones counting less
  Latencies swap_outs_, swap_ins_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_CATALOG_H_
