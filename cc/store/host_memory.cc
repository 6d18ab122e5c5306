#include "store/host_memory.h"

#include <algorithm>
#include <string>
#include <utility>

namespace kvpage::store {

bool HostMemory::MakeRoom(std::int64_t bytes, std::vector<HostBuffer>* gone) {
  for (auto& [size, buffers] : free_) {
    while (!buffers.empty() && bytes > limit_bytes_ - used_bytes_ - free_bytes_) {
      gone->push_back(std::move(buffers.back()));
      buffers.pop_back();
      free_bytes_ -= size;
    }
  }
  return bytes <= limit_bytes_ - used_bytes_ - free_bytes_;
}

Status HostMemory::Take(std::int64_t bytes, std::int64_t count, const MakeBuffer& make, std::vector<HostBuffer>* out) {
  std::vector<HostBuffer> taken;
  std::int64_t missing = 0;
  {
    std::vector<HostBuffer> gone;  // freed after the lock is released, as that may take a while
    const std::lock_guard<std::mutex> lock(mutex_);
    if (count > (limit_bytes_ - used_bytes_) / bytes) {
      return ResourceExhausted(std::to_string(count * bytes) +
                               " bytes of a swapped sequence do not fit in a store of " + std::to_string(limit_bytes_) +
                               " bytes of host memory, of which " + std::to_string(used_bytes_) +
                               " are taken: give it a larger limit");
    }
    std::vector<HostBuffer>& same = free_[bytes];
    const std::int64_t reused = std::min(count, static_cast<std::int64_t>(same.size()));
    taken.assign(std::make_move_iterator(same.end() - reused), std::make_move_iterator(same.end()));
    same.erase(same.end() - reused, same.end());
    free_bytes_ -= reused * bytes;
    used_bytes_ += reused * bytes;
    missing = count - reused;
    // This fits, because everything that is not in use can be freed.
    static_cast<void>(MakeRoom(missing * bytes, &gone));
    used_bytes_ += missing * bytes;
  }
  Status status;
  while (missing > 0) {
    HostBuffer buffer;
    status = make(bytes, &buffer);
    if (!status.ok()) break;
    taken.push_back(std::move(buffer));
    --missing;
  }
  if (missing == 0) {
    *out = std::move(taken);
    return {};
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_bytes_ -= missing * bytes;
  }
  Return(bytes, std::move(taken));
  return status;
}

void HostMemory::Return(std::int64_t bytes, std::vector<HostBuffer> buffers) {
  std::vector<HostBuffer> gone;
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::int64_t total = bytes * static_cast<std::int64_t>(buffers.size());
  used_bytes_ -= total;
  if (closed_) {
    gone = std::move(buffers);
    return;
  }
  free_bytes_ += total;
  std::vector<HostBuffer>& same = free_[bytes];
  same.insert(same.end(), std::make_move_iterator(buffers.begin()), std::make_move_iterator(buffers.end()));
}

void HostMemory::Close() {
  std::map<std::int64_t, std::vector<HostBuffer>> gone;
  const std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  free_bytes_ = 0;
  gone.swap(free_);
}

std::int64_t HostMemory::used_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return used_bytes_;
}

std::int64_t HostMemory::room() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return limit_bytes_ - used_bytes_;
}

std::int64_t HostMemory::pinned_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return used_bytes_ + free_bytes_;
}

}  // namespace kvpage::store
