// SwapStore: stores blocks of swapped sequences. A BlockStore keeps them in files, a HostStore in host memory.
#ifndef KVPAGE_STORE_SWAP_STORE_H_
#define KVPAGE_STORE_SWAP_STORE_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "base/status.h"
#include "store/file_header.h"

namespace kvpage::store {

// Blocks that a store holds; it drops them when this object is destroyed.
class SwapImage {
 public:
  virtual ~SwapImage() = default;
  virtual std::int64_t blocks() const = 0;
  virtual std::int64_t bytes() const = 0;
  // Whether the blocks are still available for another attempt after a failed read.
  virtual bool outlives_failures() const = 0;
};

// Host memory.
using HostBuffer = std::shared_ptr<char>;
using MakeBuffer = std::function<Status(std::int64_t bytes, HostBuffer* out)>;

// Blocks that only this process will read again.
struct SwapWrite {
  // Copies blocks [begin, begin + count) to `to`, [count, ranges, block_bytes]. Returns false if they are no longer
  // wanted, or if they cannot be copied and `failure` says why.
  using CopyBlocks = std::function<bool(std::int64_t begin, std::int64_t count, char* to)>;

  BlockShape shape;
  std::int64_t blocks = 0;
  CopyBlocks copy;  // called by a store thread until it returns false or all blocks are copied
  std::shared_ptr<const Status> failure = nullptr;  // null if a copy cannot fail
  MakeBuffer make_buffer = nullptr;  // allocates memory that copies can reach directly; null: any memory will do
  // Called once: by a store thread or, if the store is closed, by the thread that calls or closes it. If there is
  // neither an image nor an error, `copy` has returned false.
  std::function<void(const Status&, std::shared_ptr<SwapImage>)> done;
  std::chrono::steady_clock::time_point begun = std::chrono::steady_clock::now();
};
struct SwapRead {
  // Copies blocks [begin, begin + count) from `from`, [count, ranges, block_bytes], to their destinations.
  using PlaceBlocks = std::function<Status(std::int64_t begin, std::int64_t count, const char* from)>;

  std::shared_ptr<const SwapImage> image;  // of this store
  std::vector<char*> destinations;         // [blocks, ranges], if the host can write the blocks
  PlaceBlocks place = nullptr;             // if it cannot
  // Called once, like `done` of SwapWrite. `good`: number of leading blocks that are correct.
  std::function<void(Problem, std::int64_t good)> done;
  std::chrono::steady_clock::time_point begun = std::chrono::steady_clock::now();
};

// How long a write or read has taken so far, including queueing.
template <class Work>
double SecondsOf(const Work& work) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - work.begun).count();
}

class SwapStore {
 public:
  virtual ~SwapStore() = default;

  // Returns an error if the store is closed or in a forked child.
  virtual Status Check(const char* op) const = 0;
  // In words, for example "on disk".
  virtual const char* place() const = 0;

  // These do not wait, and accept any number of bytes: the memory for them is the pool's.
  virtual void WriteSwapped(SwapWrite write) = 0;
  virtual void ReadSwapped(SwapRead read) = 0;

  // A store thread calls `poll` from time to time until it returns true or the store is closed. The thread may hold the
  // last reference to it.
  virtual void Watch(std::function<bool()> poll) = 0;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_SWAP_STORE_H_
