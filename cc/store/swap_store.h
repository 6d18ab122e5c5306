// SwapStore: where blocks of swapped sequences go. A BlockStore has them in files, a HostStore in memory of the host.
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

// Blocks that a store has taken; it forgets them when this goes.
class SwapImage {
 public:
  virtual ~SwapImage() = default;
  virtual std::int64_t blocks() const = 0;
  virtual std::int64_t bytes() const = 0;
  // After a read that has failed the blocks are still there, for another one.
  virtual bool outlives_failures() const = 0;
};

// Memory of the host.
using HostBuffer = std::shared_ptr<char>;
using MakeBuffer = std::function<Status(std::int64_t bytes, HostBuffer* out)>;

// Blocks that this process will read again, and no other.
struct SwapWrite {
  // Copies blocks [begin, begin + count) to `to`, [count, ranges, block_bytes]. False: they are no longer wanted, or
  // `failure` says why they cannot be copied.
  using CopyBlocks = std::function<bool(std::int64_t begin, std::int64_t count, char* to)>;

  BlockShape shape;
  std::int64_t blocks = 0;
  CopyBlocks copy;  // called by a thread of the store until it refuses or all blocks are copied
  std::shared_ptr<const Status> failure = nullptr;  // null: a copy cannot fail
  MakeBuffer make_buffer = nullptr;                 // of memory that copies reach directly; null: any memory
  // Called once: by a store thread or, if the store is closed, by the thread that calls or closes it. Neither an image
  // nor an error means that `copy` has returned false.
  std::function<void(const Status&, std::shared_ptr<SwapImage>)> done;
  std::chrono::steady_clock::time_point begun = std::chrono::steady_clock::now();
};
struct SwapRead {
  // Copies blocks [begin, begin + count) from `from`, [count, ranges, block_bytes], to where they belong.
  using PlaceBlocks = std::function<Status(std::int64_t begin, std::int64_t count, const char* from)>;

  std::shared_ptr<const SwapImage> image;  // of this store
  std::vector<char*> destinations;         // [blocks, ranges], where the host can write the blocks
  PlaceBlocks place = nullptr;             // where it cannot
  // Called once, as that of SwapWrite. `good`: the blocks from the first one on that are what was written.
  std::function<void(Problem, std::int64_t good)> done;
  std::chrono::steady_clock::time_point begun = std::chrono::steady_clock::now();
};

// How long a write or read has taken so far, queueing included.
template <class Work>
double SecondsOf(const Work& work) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - work.begun).count();
}

class SwapStore {
 public:
  virtual ~SwapStore() = default;

  // An error once the store is closed, or in a forked child.
  virtual Status Check(const char* op) const = 0;
  // In words: "on disk".
  virtual const char* place() const = 0;

  // These do not wait, and take any number of bytes: the memory behind them is the pool's.
  virtual void WriteSwapped(SwapWrite write) = 0;
  virtual void ReadSwapped(SwapRead read) = 0;

  // A thread of the store calls `poll` now and then until it returns true or the store is closed. It may be the last to
  // hold it.
  virtual void Watch(std::function<bool()> poll) = 0;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_SWAP_STORE_H_
