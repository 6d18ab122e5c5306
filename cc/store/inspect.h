// Describes the files of a store without an open store: for listing, checking and pruning a directory manually.
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
  double used = 0;  // when it was written or last read, in seconds since the epoch
  Problem problem = Problem::kNone;
  FileHeader header;  // set if there is no problem
};

// Lists all block files by name; `verify`: also read and check their blocks.
Status ListFiles(const std::string& path, bool verify, std::vector<FileReport>* out);
// Removes the files last used before `used_before`, then others until at most `limit` bytes are left: the least
// recently used first, but none before those that continue it. Returns their names. Also removes what dead writers left
// behind. Fails if another process is evicting.
Status Prune(const std::string& path, std::int64_t limit, double used_before, std::vector<std::string>* removed);

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_INSPECT_H_
