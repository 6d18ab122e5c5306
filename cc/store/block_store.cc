#include "store/block_store.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "store/catalog.h"
#include "store/reader.h"
#include "store/swapper.h"
#include "store/watcher.h"
#include "store/writer.h"

namespace kvpage::store {

class BlockStore::Impl {
 public:
  Impl(Folder folder, StoreOptions options)
      : options_(std::move(options)),
        catalog_(std::move(folder), options_),
        reader_(&catalog_, options_),
        writer_(&catalog_, options_),
        swapper_(&catalog_, options_) {}

  void StartMaintaining() {
    thread_ = std::thread([this] { Maintain(); });
  }
  bool here() const { return getpid() == process_; }
  bool closed() const { return closed_.load(); }
  const StoreOptions& options() const { return options_; }
  Catalog& catalog() { return catalog_; }
  const Catalog& catalog() const { return catalog_; }
  Reader& reader() { return reader_; }
  Writer& writer() { return writer_; }
  Swapper& swapper() { return swapper_; }
  Watcher& watcher() { return watcher_; }

  void Close() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    ended_.notify_all();
    const std::lock_guard<std::mutex> join(join_mutex_);  // several threads may close it
    writer_.Stop();
    reader_.Stop();
    watcher_.Stop();
    swapper_.Stop();
    if (thread_.joinable()) thread_.join();
  }

 private:
  void Maintain() {
    const auto pause = std::chrono::duration<double>(options_.refresh_seconds);
    std::unique_lock<std::mutex> lock(mutex_);
    while (!ended_.wait_for(lock, pause, [this] { return closed(); })) {
      lock.unlock();
      catalog_.Maintain();
      lock.lock();
    }
  }

  const pid_t process_ = getpid();
  const StoreOptions options_;
  Catalog catalog_;
  Reader reader_;
  Writer writer_;
  Swapper swapper_;
  Watcher watcher_;
  std::mutex mutex_, join_mutex_;
  std::condition_variable ended_;
  std::atomic<bool> closed_{false};
  std::thread thread_;
};

BlockStore::BlockStore(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

BlockStore::~BlockStore() {
  Close();
  // In a forked child the store's threads do not exist, and its locks may never be released.
  if (!impl_->here()) {
    [[maybe_unused]] const Impl* const left_alive = impl_.release();
  }
}

Status BlockStore::Open(const std::string& path, StoreOptions options, std::unique_ptr<BlockStore>* out) {
  Folder folder;
  KVPAGE_RETURN_IF_ERROR(Folder::Open(path, &folder));
  if (options.io == nullptr) options.io = std::make_shared<FileIo>();
  try {
    auto impl = std::make_unique<Impl>(std::move(folder), std::move(options));
    KVPAGE_RETURN_IF_ERROR(impl->catalog().Refresh(/*force=*/true));
    impl->StartMaintaining();
    out->reset(new BlockStore(std::move(impl)));
  } catch (const std::system_error& error) {
    return ResourceExhausted(std::string("the threads of a store could not be started: ") + error.what());
  }
  return {};
}

const StoreOptions& BlockStore::options() const { return impl_->options(); }

Status BlockStore::Check(const char* op) const {
  const std::string begin = std::string(op) + ": the store ";
  if (!impl_->here()) {
    return FailedPrecondition(begin + "belongs to a parent process: open it again in this one", Reason::kForked);
  }
  if (impl_->closed()) return FailedPrecondition(begin + "is closed", Reason::kClosed);
  return {};
}

std::int64_t BlockStore::Find(const BlockShape& shape, const std::string& space, const std::int32_t* tokens,
                              std::int64_t count) {
  if (!Check("find").ok()) return 0;
  Catalog& catalog = impl_->catalog();
  return catalog.LookUp(catalog.MakeIdentity(shape, space), tokens, count);
}

std::int64_t BlockStore::StoredBlocks(const BlockShape& shape, const std::string& space,
                                      const std::vector<std::int32_t>& tokens) {
  if (!Check("find").ok()) return 0;
  Catalog& catalog = impl_->catalog();
  const auto parts =
      catalog.Find(catalog.MakeIdentity(shape, space), tokens.data(), static_cast<std::int64_t>(tokens.size()));
  return parts.empty() ? 0 : parts.back().end;
}

std::vector<StoredRun> BlockStore::Runs(const BlockShape& shape) {
  return Check("runs").ok() ? impl_->catalog().Runs(shape) : std::vector<StoredRun>();
}

std::vector<StoredRun> BlockStore::Lost(const BlockShape& shape, std::int64_t* seen) {
  return Check("lost").ok() ? impl_->catalog().Lost(shape, seen) : std::vector<StoredRun>();
}

bool BlockStore::Write(WriteRun& run) { return Check("write").ok() && impl_->writer().Write(run); }

bool BlockStore::WaitForRoom(std::int64_t bytes, double seconds) {
  return Check("write").ok() && impl_->writer().WaitForRoom(bytes, seconds);
}

std::shared_ptr<ReadTicket> BlockStore::Read(ReadRequest request) {
  if (Check("read").ok()) return impl_->reader().Read(std::move(request));
  if (request.done) request.done(0, Problem::kClosed);
  return std::make_shared<ReadTicket>(0, 0, Problem::kClosed);
}

double BlockStore::read_bytes_per_second() { return impl_->here() ? impl_->catalog().read_bytes_per_second() : 0; }

void BlockStore::WriteSwapped(SwapWrite write) {
  if (const Status status = Check("swap_out"); !status.ok()) return write.done(status, nullptr);
  impl_->swapper().Write(std::move(write));
}

void BlockStore::ReadSwapped(SwapRead read) {
  if (!Check("swap_in").ok()) return read.done(Problem::kClosed, 0);
  impl_->swapper().Read(std::move(read));
}

void BlockStore::Watch(std::function<bool()> poll) {
  if (!Check("swap_out").ok()) return;
  try {
    impl_->watcher().Add(std::move(poll));
  } catch (const std::exception& error) {  // the pool's own calls continue it
    impl_->catalog().NoteError(
        ResourceExhausted(std::string("a thread of a store could not be started: ") + error.what()));
  }
}

Status BlockStore::Refresh() {
  KVPAGE_RETURN_IF_ERROR(Check("refresh"));
  return impl_->catalog().Refresh(/*force=*/true);
}

StoreNumbers BlockStore::Numbers() {
  if (!impl_->here()) return {};
  StoreNumbers numbers = impl_->catalog().Numbers();
  numbers.bytes_queued = impl_->writer().bytes_queued();
  return numbers;
}

void BlockStore::Close() {
  if (impl_->here()) impl_->Close();
}

}  // namespace kvpage::store
