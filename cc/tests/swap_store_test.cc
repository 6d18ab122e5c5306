// Blocks that a store writes for its own process: all or nothing, in unnamed files, within the limit.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "store/swap_file.h"
#include "tests/faulty_io.h"
#include "tests/store_util.h"

namespace kvpage::store::testing {
namespace {

using FilePtr = std::shared_ptr<SwapImage>;

// A result that another thread provides.
template <class Value>
class Awaited {
 public:
  void Set(Value value) {
    const std::lock_guard<std::mutex> lock(mutex_);
    value_ = std::move(value);
    ++times_;
    changed_.notify_all();
  }
  Value Get() {
    std::unique_lock<std::mutex> lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(60), [&] { return times_ > 0; }));
    EXPECT_EQ(times_, 1);
    return value_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  Value value_{};
  int times_ = 0;
};

class SwapStoreTest : public ::testing::Test {
 protected:
  SwapStoreTest() {
    options_ = SmallOptions();
    options_.io = io_;
    shape_ = SmallShape(300000);  // pieces of 3 blocks
    blocks_ = MakeBlocks({shape_, "", ""}, MakeTokens(10, 1), 0, 10);
  }
  // Writes the blocks, and stops copying after `copied` blocks.
  std::pair<Status, FilePtr> Write(BlockStore* store, std::int64_t copied = 10) {
    const auto result = std::make_shared<Awaited<std::pair<Status, FilePtr>>>();
    SwapWrite write;
    write.shape = shape_;
    write.blocks = 10;
    write.copy = [this, copied](std::int64_t begin, std::int64_t count, char* to) {
      std::memcpy(to, blocks_->bytes.data() + begin * shape_.bytes(), count * shape_.bytes());
      return begin + count <= copied;
    };
    write.done = [result](const Status& status, FilePtr file) { result->Set({status, std::move(file)}); };
    store->WriteSwapped(std::move(write));
    return result->Get();
  }
  // Returns how many blocks can be read back, after checking their contents.
  std::int64_t Read(BlockStore* store, const FilePtr& file, Problem wanted = Problem::kNone) {
    const auto result = std::make_shared<Awaited<std::pair<Problem, std::int64_t>>>();
    Blocks back(shape_, 10);
    store->ReadSwapped(
        {file, back.ranges, nullptr, [result](Problem problem, std::int64_t good) { result->Set({problem, good}); }});
    const auto [problem, good] = result->Get();
    EXPECT_EQ(problem, wanted);
    EXPECT_EQ(std::memcmp(back.bytes.data(), blocks_->bytes.data(), good * shape_.bytes()), 0);
    return good;
  }

  const TemporaryFolder folder_;
  const std::shared_ptr<FaultyIo> io_ = std::make_shared<FaultyIo>();
  StoreOptions options_;
  BlockShape shape_;
  std::shared_ptr<Blocks> blocks_;
};

TEST_F(SwapStoreTest, WhatWasWrittenComesBack) {
  const auto store = OpenStore(folder_, options_);
  for (const bool short_calls : {false, true}) {
    io_->short_calls = short_calls;
    auto [status, file] = Write(store.get());
    ASSERT_OK(status);
    EXPECT_EQ(folder_.entries(), 0);
    EXPECT_EQ(store->Numbers().bytes_swapped, 10 * shape_.bytes());
    EXPECT_EQ(store->Numbers().bytes, 0);
    EXPECT_EQ(Read(store.get(), file), 10);
    EXPECT_EQ(Read(store.get(), file), 10);
    EXPECT_GT(store->Numbers().read_bytes_per_second, 0);
    file.reset();
    EXPECT_EQ(store->Numbers().bytes_swapped, 0);
  }
}

TEST_F(SwapStoreTest, AFailedWriteLeavesNothing) {
  const auto store = OpenStore(folder_, options_);
  io_->write_error = ENOSPC;
  io_->writes_left = 2;
  auto result = Write(store.get());
  EXPECT_EQ(result.first.code(), Code::kResourceExhausted);
  EXPECT_EQ(result.second, nullptr);
  io_->write_error = 0;
  io_->sync_error = EIO;
  result = Write(store.get());
  EXPECT_EQ(result.first.code(), Code::kFailedPrecondition);
  EXPECT_EQ(result.second, nullptr);
  io_->sync_error = 0;
  EXPECT_EQ(store->Numbers().failed_writes, 2);
  EXPECT_EQ(store->Numbers().bytes_swapped, 0);
  EXPECT_EQ(folder_.entries(), 0);
  // Wanted again before it was written.
  result = Write(store.get(), 4);
  EXPECT_OK(result.first);
  EXPECT_EQ(result.second, nullptr);
  EXPECT_EQ(store->Numbers().bytes_swapped, 0);
  EXPECT_EQ(store->Numbers().failed_writes, 2);
}

TEST_F(SwapStoreTest, FilesCountBelowTheLimit) {
  options_.limit_bytes = 25 * shape_.bytes();
  const auto store = OpenStore(folder_, options_);
  ASSERT_OK(WriteNow(store.get(), MakeRun(shape_, MakeTokens(4, 1))));
  auto first = Write(store.get());
  auto second = Write(store.get());
  ASSERT_OK(first.first);
  ASSERT_OK(second.first);
  EXPECT_EQ(store->Numbers().files, 1);
  // The next prefix must make room for itself.
  ASSERT_OK(WriteNow(store.get(), MakeRun(shape_, MakeTokens(3, 2))));
  EXPECT_EQ(store->Numbers().files, 1);
  EXPECT_EQ(store->Numbers().files_evicted, 1);
  const auto third = Write(store.get());
  EXPECT_EQ(third.first.code(), Code::kResourceExhausted);
  EXPECT_NE(third.first.message().find("do not fit in a store"), std::string::npos);
  second.second.reset();
  EXPECT_OK(Write(store.get()).first);
  EXPECT_EQ(Read(store.get(), first.second), 10);
}

TEST_F(SwapStoreTest, BytesThatChangedAreNotGivenOut) {
  const auto store = OpenStore(folder_, options_);
  const auto file = Write(store.get()).second;
  ASSERT_NE(file, nullptr);
  // The file has no name, but a descriptor.
  std::string path;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code error;
    const std::string target = std::filesystem::read_symlink(entry.path(), error).string();
    if (target.find(".writing-") != std::string::npos) path = entry.path().string();
  }
  ASSERT_FALSE(path.empty());
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  const std::int64_t at = 7 * shape_.bytes() + 11;
  char byte = 0;
  ASSERT_EQ(pread(fd, &byte, 1, at), 1);
  byte ^= 16;
  ASSERT_EQ(pwrite(fd, &byte, 1, at), 1);
  EXPECT_EQ(Read(store.get(), file, Problem::kDamaged), 7);
  ASSERT_EQ(ftruncate(fd, 4 * shape_.bytes()), 0);
  close(fd);
  EXPECT_EQ(Read(store.get(), file, Problem::kTruncated), 3);  // complete pieces only
  io_->read_error = EIO;
  EXPECT_EQ(Read(store.get(), file, Problem::kUnreadable), 0);
}

TEST_F(SwapStoreTest, AClosedStoreIsDoneAtOnce) {
  auto store = OpenStore(folder_, options_);
  const auto file = Write(store.get()).second;
  store->Close();
  EXPECT_EQ(Write(store.get()).first.reason(), Reason::kClosed);
  EXPECT_EQ(Read(store.get(), file, Problem::kClosed), 0);
  store.reset();  // the file may outlive it
}

TEST_F(SwapStoreTest, WhatIsQueuedIsDoneWhenTheStoreCloses) {
  options_.writers = options_.readers = 1;
  const auto store = OpenStore(folder_, options_);
  const auto file = Write(store.get()).second;
  io_->hold_reads = true;
  std::atomic<int> done{0}, closed{0};
  Blocks back(shape_, 10);
  for (int i = 0; i < 3; ++i) {
    store->ReadSwapped({file, back.ranges, nullptr, [&](Problem problem, std::int64_t) {
                          ++done;
                          closed += problem == Problem::kClosed;
                        }});
  }
  std::thread releases([&] {
    usleep(20000);
    io_->hold_reads = false;
  });
  store->Close();
  releases.join();
  EXPECT_EQ(done, 3);
  EXPECT_GE(closed, 2);
}

TEST_F(SwapStoreTest, AForkedChildLeavesTheFileAlone) {
  const auto store = OpenStore(folder_, options_);
  auto file = Write(store.get()).second;
  const pid_t child = fork();
  if (child == 0) {
    file.reset();
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(Read(store.get(), file), 10);
}

}  // namespace
}  // namespace kvpage::store::testing
