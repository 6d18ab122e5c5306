// Folder: the directory of a store on disk. Files are accessed by their names in it and no symbolic link is followed,
// so that nothing outside is read, written or removed.
#ifndef KVPAGE_STORE_FOLDER_H_
#define KVPAGE_STORE_FOLDER_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "store/file_io.h"

namespace kvpage::store {

struct FolderEntry {
  std::string name;
  std::int64_t bytes = 0;
  double used = 0;  // when it was written or last read, in seconds since the epoch
  std::uint64_t inode = 0;
};

// The lock of the process that evicts. Released with this object, even if a forked child still has the descriptor.
class FolderLock {
 public:
  explicit FolderLock(Fd file) : file_(std::move(file)) {}
  ~FolderLock() { Reset(); }
  FolderLock(FolderLock&&) = default;
  FolderLock& operator=(FolderLock&&) = delete;
  bool ok() const { return file_.ok(); }
  void Reset();

 private:
  Fd file_;
};

class Folder {
 public:
  // Opens the directory; creates it if it is missing (but not its parent), accessible by its user only.
  static Status Open(const std::string& path, Folder* out);
  // Opens an existing directory; an error if it does not exist.
  static Status Find(const std::string& path, Folder* out);

  const std::string& path() const { return path_; }
  int fd() const { return fd_.get(); }
  // Lists all block files, in no particular order.
  Status List(std::vector<FolderEntry>* out) const;
  // When files were last added or removed, and the current time, in seconds since the epoch.
  double ChangeTime() const;
  static double Now();
  bool Has(const std::string& name) const;
  // Opens a file for reading; if that fails, the Fd is not ok and errno is set.
  Fd OpenFile(const std::string& name) const;
  // Creates a file for reading and writing that no lookup finds, locked while it is open.
  Status MakeTemporary(std::string* name, Fd* out) const;
  // Returns whether the file is gone afterwards.
  bool Remove(const std::string& name) const;
  // Only one process at a time may evict; the lock is not ok if another one has it.
  FolderLock TryLock() const;
  // Removes files left behind by writers that have ended.
  void RemoveOrphans() const;

 private:
  std::string path_;
  Fd fd_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_FOLDER_H_
