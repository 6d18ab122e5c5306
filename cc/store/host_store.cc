#include "store/host_store.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>
#include <utility>
#include <vector>

namespace kvpage::store {
namespace {

constexpr std::int64_t kAnyNumber = std::numeric_limits<std::int64_t>::max();

// Weight of a new measurement.
constexpr double kNewest = 0.25;

Status MakePlainBuffer(std::int64_t bytes, HostBuffer* out) {
  out->reset(new char[static_cast<std::size_t>(bytes)], std::default_delete<char[]>());
  return {};
}

Status NoThreads(const std::exception& error) {
  return ResourceExhausted(std::string("the threads of a store could not be started: ") + error.what());
}

}  // namespace

// A buffer for each logical block.
class HostStore::Image final : public SwapImage {
 public:
  Image(std::shared_ptr<HostMemory> memory, BlockShape shape, std::vector<HostBuffer> buffers)
      : memory_(std::move(memory)), shape_(std::move(shape)), buffers_(std::move(buffers)) {}
  ~Image() override { memory_->Return(shape_.bytes(), std::move(buffers_)); }
  Image(const Image&) = delete;
  Image& operator=(const Image&) = delete;

  std::int64_t blocks() const override { return static_cast<std::int64_t>(buffers_.size()); }
  std::int64_t bytes() const override { return blocks() * shape_.bytes(); }
  bool outlives_failures() const override { return true; }
  char* block(std::int64_t i) const { return buffers_[i].get(); }
  // Copies a block to its destination.
  Status Place(const SwapRead& read, std::int64_t i) const {
    if (read.place) return read.place(i, 1, block(i));
    for (std::int64_t range = 0; range < shape_.ranges; ++range) {
      std::memcpy(read.destinations[i * shape_.ranges + range], block(i) + range * shape_.block_bytes,
                  shape_.block_bytes);
    }
    return {};
  }

 private:
  const std::shared_ptr<HostMemory> memory_;
  const BlockShape shape_;
  std::vector<HostBuffer> buffers_;
};

HostStore::HostStore(std::int64_t limit_bytes)
    : process_(getpid()),
      memory_(std::make_shared<HostMemory>(limit_bytes)),
      prefixes_(std::make_unique<HostPrefixes>(memory_)),
      watcher_(std::make_unique<Watcher>()) {}

HostStore::~HostStore() {
  Close();
  if (here()) return;
  // In a forked child the store's threads do not exist, and its locks may never be released.
  [[maybe_unused]] const void* left_alive = writes_.release();
  left_alive = reads_.release();
  left_alive = prefixes_.release();
  left_alive = watcher_.release();
}

bool HostStore::here() const { return getpid() == process_; }

Status HostStore::Check(const char* op) const {
  const std::string begin = std::string(op) + ": the store ";
  if (!here()) {
    return FailedPrecondition(begin + "belongs to a parent process: make a new one in this one", Reason::kForked);
  }
  if (closed_.load()) return FailedPrecondition(begin + "is closed", Reason::kClosed);
  return {};
}

void HostStore::NoteError(const Status& status, std::int64_t HostNumbers::* count) {
  const std::lock_guard<std::mutex> lock(numbers_mutex_);
  ++(numbers_.*count);
  numbers_.last_error = status.message();
}

void HostStore::WriteSwapped(SwapWrite write) {
  Status status = Check("swap_out");
  if (status.ok()) {
    const std::lock_guard<std::mutex> lock(queues_mutex_);
    try {
      if (!closed_.load() && writes_ == nullptr) {
        writes_ = std::make_unique<WorkQueue<SwapWrite>>(1, kAnyNumber, [this](SwapWrite& each) { WorkOn(each); });
      }
      if (writes_ != nullptr && writes_->Offer(write, write.blocks * write.shape.bytes())) return;
      status = Check("swap_out");
    } catch (const std::exception& error) {
      status = NoThreads(error);
    }
  }
  write.done(status, nullptr);
}

Status HostStore::Fill(const SwapWrite& write, std::shared_ptr<SwapImage>* out) {
  std::vector<HostBuffer> buffers;
  // Prefixes can be recomputed, so swapped sequences displace them. If that does not make enough room, Take reports it.
  static_cast<void>(prefixes_->MakeRoom(write.blocks * write.shape.bytes()));
  KVPAGE_RETURN_IF_ERROR(memory_->Take(write.shape.bytes(), write.blocks,
                                       write.make_buffer ? write.make_buffer : MakePlainBuffer, &buffers));
  auto image = std::make_shared<Image>(memory_, write.shape, std::move(buffers));
  for (std::int64_t i = 0; i < write.blocks; ++i) {
    if (!write.copy(i, 1, image->block(i))) return write.failure == nullptr ? Status() : *write.failure;
  }
  *out = std::move(image);
  return {};
}

void HostStore::WorkOn(SwapWrite& write) {
  Status status;
  std::shared_ptr<SwapImage> image;
  try {
    status = Fill(write, &image);
  } catch (const std::exception& error) {  // such as std::bad_alloc
    status = Internal(std::string("copying swapped blocks: ") + error.what());
  }
  if (image != nullptr) {
    const std::lock_guard<std::mutex> lock(numbers_mutex_);
    numbers_.bytes_written += image->bytes();
    swap_outs_.Add(SecondsOf(write));
  } else if (!status.ok()) {
    const bool full = status.code() == Code::kResourceExhausted;
    NoteError(status, full ? &HostNumbers::refused_writes : &HostNumbers::failed_writes);
  }
  write.done(status, std::move(image));
}

void HostStore::ReadSwapped(SwapRead read) {
  Problem problem = Problem::kClosed;
  {
    const std::lock_guard<std::mutex> lock(queues_mutex_);
    try {
      if (Check("swap_in").ok() && reads_ == nullptr) {
        reads_ = std::make_unique<WorkQueue<SwapRead>>(1, kAnyNumber, [this](SwapRead& each) { WorkOn(each); });
      }
      if (reads_ != nullptr && reads_->Offer(read, read.image->bytes())) return;
    } catch (const std::exception& error) {
      NoteError(NoThreads(error), &HostNumbers::failed_reads);
      problem = Problem::kUnreadable;
    }
  }
  read.done(problem, 0);
}

void HostStore::WorkOn(SwapRead& read) {
  const auto& image = static_cast<const Image&>(*read.image);  // the store creates all of its images itself
  const std::int64_t bytes = image.bytes();
  Status status;
  std::int64_t good = 0;
  while (good < image.blocks() && (status = image.Place(read, good)).ok()) ++good;
  if (status.ok()) {
    const double seconds = SecondsOf(read);
    const double speed = static_cast<double>(bytes) / std::max(seconds, 1e-9);
    const std::lock_guard<std::mutex> lock(numbers_mutex_);
    swap_ins_.Add(seconds);
    numbers_.bytes_read += bytes;
    double& latest = numbers_.read_bytes_per_second;
    latest = latest == 0 ? speed : latest + kNewest * (speed - latest);
  } else {
    NoteError(status, &HostNumbers::failed_reads);
  }
  const auto done = std::move(read.done);
  read.image.reset();  // before the caller can check the space left
  done(status.ok() ? Problem::kNone : Problem::kUnreadable, good);
}

void HostStore::Watch(std::function<bool()> poll) {
  if (!Check("swap_out").ok()) return;
  try {
    watcher_->Add(std::move(poll));
  } catch (const std::exception& error) {
    NoteError(NoThreads(error), &HostNumbers::failed_writes);  // the pool's own calls continue it
  }
}

HostNumbers HostStore::Numbers() const {
  if (!here()) return {};
  const std::lock_guard<std::mutex> lock(numbers_mutex_);
  HostNumbers numbers = numbers_;
  numbers.limit_bytes = memory_->limit_bytes();
  numbers.used_bytes = memory_->used_bytes();
  numbers.pinned_bytes = memory_->pinned_bytes();
  numbers.swap_outs = swap_outs_.numbers();
  numbers.swap_ins = swap_ins_.numbers();
  numbers.prefixes = prefixes_->Numbers();
  return numbers;
}

void HostStore::Close() {
  if (!here()) return;
  closed_ = true;
  const std::lock_guard<std::mutex> join(join_mutex_);  // several threads may close it
  watcher_->Stop();
  {
    // From now on nobody creates a queue.
    const std::lock_guard<std::mutex> lock(queues_mutex_);
  }
  if (writes_ != nullptr) {
    for (const SwapWrite& write : writes_->Stop()) write.done(Check("swap_out"), nullptr);
  }
  if (reads_ != nullptr) {
    for (SwapRead& read : reads_->Stop()) {
      const auto done = std::move(read.done);
      read.image.reset();
      done(Problem::kClosed, 0);
    }
  }
  prefixes_->Stop();
  memory_->Close();
}

}  // namespace kvpage::store
