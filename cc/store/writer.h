// Writer: writes blocks to disk with threads behind a bounded queue.
#ifndef KVPAGE_STORE_WRITER_H_
#define KVPAGE_STORE_WRITER_H_

#include <cstdint>

#include "base/status.h"
#include "store/block_store.h"
#include "store/catalog.h"
#include "store/work_queue.h"

namespace kvpage::store {

class Writer {
 public:
  Writer(Catalog* catalog, const StoreOptions& options);
  ~Writer() { Stop(); }

  // See BlockStore::Write and WaitForRoom.
  bool Write(WriteRun& run);
  bool WaitForRoom(std::int64_t bytes, double seconds) { return queue_.WaitForRoom(bytes, seconds); }
  std::int64_t bytes_queued() const { return queue_.bytes(); }
  // Finishes the runs in progress. The others are not written.
  void Stop();

 private:
  void Work(WriteRun& run);
  Status WriteFiles(const WriteRun& run);

  Catalog* const catalog_;
  const StoreOptions& options_;
  WorkQueue<WriteRun> queue_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_WRITER_H_
