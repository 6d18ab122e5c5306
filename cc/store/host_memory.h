// HostMemory: the buffers of a HostStore, within its limit.
//
// Pinning memory takes the system much longer than a copy, so buffers are kept for reuse. They are freed only to make
// room for buffers of another size, and when the store is closed. Buffers in use may outlive the store.
#ifndef KVPAGE_STORE_HOST_MEMORY_H_
#define KVPAGE_STORE_HOST_MEMORY_H_

#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "base/status.h"
#include "store/swap_store.h"

namespace kvpage::store {

class HostMemory {
 public:
  explicit HostMemory(std::int64_t limit_bytes) : limit_bytes_(limit_bytes) {}
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  // Takes `count` buffers of `bytes` each. All or nothing: fails with RESOURCE_EXHAUSTED if they do not fit, or with
  // the error of `make`.
  Status Take(std::int64_t bytes, std::int64_t count, const MakeBuffer& make, std::vector<HostBuffer>* out);
  // Returns buffers of this size.
  void Return(std::int64_t bytes, std::vector<HostBuffer> buffers);
  // From now on buffers are freed when they are returned.
  void Close();

  std::int64_t limit_bytes() const { return limit_bytes_; }
  std::int64_t used_bytes() const;    // in buffers in use
  std::int64_t room() const;          // available for more buffers
  std::int64_t pinned_bytes() const;  // in all buffers

 private:
  // Frees unused buffers until `bytes` more fit; returns false if they do not.
  bool MakeRoom(std::int64_t bytes, std::vector<HostBuffer>* gone);

  const std::int64_t limit_bytes_;
  mutable std::mutex mutex_;
  bool closed_ = false;
  std::int64_t used_bytes_ = 0, free_bytes_ = 0;
  std::map<std::int64_t, std::vector<HostBuffer>> free_;  // by size
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_HOST_MEMORY_H_
