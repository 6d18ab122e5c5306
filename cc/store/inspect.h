// What the files of a store are, apart from any open store: for listing, checking and pruning a directory by hand.
#ifndef KVPAGE_STORE_INSPECT_H_
#define KVPAGE_STORE_INSPECT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "store/file_header.h"

namespace kvpage::store {

struct FileReport {
  std::string name;
  std::int64_t bytes = 0;
  double used = 0;  // when it was written or last read, seconds since the epoch
  Problem problem = Problem::kNone;
  FileHeader header;  // without a problem
};

// All block files by name; `verify`: their blocks are read and checked as well.
Status ListFiles(const std::string& path, bool verify, std::vector<FileReport>* out);
// Removes the files last used before `used_before`, then others until at most `limit` bytes are left: the least
// recently used first, but none before those that continue it. Returns their names. What dead writers left goes too. An
// error if another process evicts.
Status Prune(const std::string& path, std::int64_t limit, double used_before, std::vector<std::string>* removed);

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_INSPECT_H_
