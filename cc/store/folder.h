// Folder: the directory of a store on disk. Files are looked at by their names in it and no symbolic link is followed,
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
  double used = 0;  // when it was written or last read, seconds since the epoch
  std::uint64_t inode = 0;
};

// The lock of the process that evicts. It ends with this object, though a forked child may hold the descriptor still.
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
  // The directory is made if it is missing (its parent is not), for its user alone.
  static Status Open(const std::string& path, Folder* out);
  // The same for a directory that exists; an error if it does not.
  static Status Find(const std::string& path, Folder* out);

  const std::string& path() const { return path_; }
  int fd() const { return fd_.get(); }
  // All block files, in no order.
  Status List(std::vector<FolderEntry>* out) const;
  // When files last came or went, and the time now, in seconds since the epoch.
  double ChangeTime() const;
  static double Now();
  bool Has(const std::string& name) const;
  // For reading; not ok with errno set.
  Fd OpenFile(const std::string& name) const;
  // A new file, for reading and writing, that no look-up finds, locked while it is open.
  Status MakeTemporary(std::string* name, Fd* out) const;
  // Whether the file is gone now.
  bool Remove(const std::string& name) const;
  // One process at a time evicts; not ok when another one does.
  FolderLock TryLock() const;
  // Removes what writers left that have ended.
  void RemoveOrphans() const;

 private:
  std::string path_;
  Fd fd_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_FOLDER_H_
