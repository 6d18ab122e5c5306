// BlockStore when things fail: what is read is right or missing, never wrong, and the store stays usable.
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/wait.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <ctime>
#include <thread>

#include "store/inspect.h"
#include "tests/faulty_io.h"
#include "tests/store_util.h"

namespace kvpage::store::testing {
namespace {

class StoreFaultsTest : public ::testing::Test {
 protected:
  StoreFaultsTest() {
    options_ = SmallOptions();
    options_.io = io_;
    options_.refresh_seconds = 1000;
  }
  const TemporaryFolder folder_;
  const std::shared_ptr<FaultyIo> io_ = std::make_shared<FaultyIo>();
  StoreOptions options_;
};

TEST_F(StoreFaultsTest, ShortCallsTransferEverything) {
  io_->short_calls = true;
  const auto store = OpenStore(folder_, options_);
  const Tokens tokens = MakeTokens(9, 1);
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), tokens)));
  EXPECT_EQ(ReadBack(store.get(), SmallShape(), tokens), 9);
}

TEST_F(StoreFaultsTest, AFailedWriteLeavesNothingAndTheStoreGoesOn) {
  const auto store = OpenStore(folder_, options_);
  const Tokens kept = MakeTokens(4, 1), lost = MakeTokens(4, 2);
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), kept)));
  const std::size_t entries = folder_.entries();
  std::int64_t failed = 0;
  const auto fails = [&](std::atomic<int>* error, int value, Code code) {
    *error = value;
    const Status status = WriteNow(store.get(), MakeRun(SmallShape(), lost));
    *error = 0;
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_EQ(folder_.entries(), entries);
    EXPECT_EQ(store->Find(SmallShape(), "", lost.data(), 16), 0);
    EXPECT_EQ(ReadBack(store.get(), SmallShape(), kept), 4);
    const StoreNumbers numbers = store->Numbers();
    EXPECT_EQ(numbers.failed_writes, ++failed);
    EXPECT_EQ(numbers.last_error, status.message());
    EXPECT_EQ(numbers.files, 1);
  };
  for (const int writes : {0, 1}) {  // the write of the blocks, or of the header
    io_->writes_left = writes;
    fails(&io_->write_error, ENOSPC, Code::kResourceExhausted);
    io_->writes_left = writes;
    fails(&io_->write_error, EIO, Code::kFailedPrecondition);
  }
  fails(&io_->sync_error, EDQUOT, Code::kResourceExhausted);
  fails(&io_->rename_error, EACCES, Code::kFailedPrecondition);
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), lost)));
  EXPECT_EQ(ReadBack(store.get(), SmallShape(), lost), 4);
}

TEST_F(StoreFaultsTest, AFailedReadIsAMissUntilTheFileCanBeReadAgain) {
  const auto store = OpenStore(folder_, options_);
  const Tokens tokens = MakeTokens(4, 1);
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), tokens)));
  io_->read_error = EIO;
  Problem problem = Problem::kNone;
  EXPECT_EQ(ReadBack(store.get(), SmallShape(), tokens, 0, "", &problem), 0);
  EXPECT_EQ(problem, Problem::kUnreadable);
  EXPECT_EQ(store->Numbers().missed[static_cast<int>(Problem::kUnreadable)], 1);
  EXPECT_EQ(store->Find(SmallShape(), "", tokens.data(), 16), 0);
  io_->read_error = 0;
  ASSERT_OK(store->Refresh());
  EXPECT_EQ(ReadBack(store.get(), SmallShape(), tokens), 4);
}

TEST_F(StoreFaultsTest, AFileThatCouldNotBeReadIsTriedAgainAlthoughTheFolderHasNotChanged) {
  options_.refresh_seconds = 0.05;
  const auto store = OpenStore(folder_, options_);
  const Tokens tokens = MakeTokens(4, 1);
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), tokens)));
  // A listing that soon after a change does not rely on the folder's time.
  std::this_thread::sleep_for(std::chrono::milliseconds(2200));
  io_->read_error = EMFILE;
  EXPECT_EQ(ReadBack(store.get(), SmallShape(), tokens), 0);
  io_->read_error = 0;
  std::int64_t found = 0;
  for (int round = 0; found == 0 && round < 400; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    found = store->Find(SmallShape(), "", tokens.data(), 16);
  }
  EXPECT_EQ(found, 16);
  EXPECT_EQ(ReadBack(store.get(), SmallShape(), tokens), 4);
}

TEST_F(StoreFaultsTest, DamageAnywhereIsAMissOrHarmless) {
  const BlockShape shape = SmallShape(3000);
  const Tokens a = MakeTokens(6, 1), b = MakeTokens(9, 2, 3);
  {
    const auto store = OpenStore(folder_, options_);
    ASSERT_OK(WriteNow(store.get(), MakeRun(shape, a)));
    ASSERT_OK(WriteNow(store.get(), MakeRun(shape, b)));
  }
  const std::vector<std::string> files = folder_.files();
  ASSERT_EQ(files.size(), 2u);
  std::minstd_rand random(7);
  std::int64_t lost = 0, kept = 0;
  for (int round = 0; round < 200; ++round) {
    const std::string& name = files[round % 2];
    const auto size = static_cast<std::int64_t>(std::filesystem::file_size(name));
    const Fd file(open(name.c_str(), O_RDWR));
    const std::int64_t at = random() % size;
    char before = 0;
    ASSERT_EQ(pread(file.get(), &before, 1, at), 1);
    const bool cut = round % 8 == 7, grown = round % 16 == 7;
    if (grown) {
      ASSERT_EQ(pwrite(file.get(), "more", 4, size), 4);
    } else {
      const char changed = static_cast<char>(before ^ (1 << (random() % 8)));
      ASSERT_EQ(pwrite(file.get(), &changed, 1, at), 1);
    }
    std::vector<char> tail;
    if (cut && !grown) {
      tail.resize(size - at);
      ASSERT_EQ(pwrite(file.get(), &before, 1, at), 1);
      ASSERT_EQ(pread(file.get(), tail.data(), tail.size(), at), size - at);
      ASSERT_EQ(ftruncate(file.get(), at), 0);
    }
    {
      const auto store = OpenStore(folder_, options_);  // finds damaged headers when it is opened
      for (const Tokens* tokens : {&a, &b}) {
        const std::int64_t blocks = static_cast<std::int64_t>(tokens->size()) / 4;
        const std::int64_t good = ReadBack(store.get(), shape, *tokens);  // compares the bytes
        lost += blocks - good;
        kept += good;
        if (good == blocks) continue;
        EXPECT_LT(store->Find(shape, "", tokens->data(), blocks * 4), blocks * 4);
        // It is written again, correctly.
        if (round % 5 == 0) {
          ASSERT_OK(WriteNow(store.get(), MakeRun(shape, *tokens)));
          EXPECT_EQ(ReadBack(store.get(), shape, *tokens), blocks);
        }
      }
    }
    if (!tail.empty()) {
      ASSERT_EQ(pwrite(file.get(), tail.data(), tail.size(), at), static_cast<ssize_t>(tail.size()));
    }
    ASSERT_EQ(pwrite(file.get(), &before, 1, at), 1);
    ASSERT_EQ(ftruncate(file.get(), size), 0);
  }
  EXPECT_GT(lost, 100);
  EXPECT_GT(kept, 1000);
}

TEST_F(StoreFaultsTest, ForeignThingsInTheFolderAreNeitherFollowedNorRemoved) {
  const std::string outside = folder_.path() + "/outside.txt", path = folder_.path() + "/";
  ASSERT_EQ(symlink(outside.c_str(), (path + "0-0.kv.safetensors").c_str()), 0);
  ASSERT_EQ(mkfifo((path + "1-0.kv.safetensors").c_str(), 0600), 0);
  ASSERT_EQ(mkdir((path + "2-0.kv.safetensors").c_str(), 0700), 0);
  const auto write = [&](const std::string& name, const std::string& text) {
    const Fd file(open((path + name).c_str(), O_WRONLY | O_CREAT, 0600));
    ASSERT_EQ(pwrite(file.get(), text.data(), text.size(), 0), static_cast<ssize_t>(text.size()));
  };
  write("outside.txt", "secret");
  write("3-0.kv.safetensors", "");
  write("4-0.kv.safetensors", std::string("\x10\0\0\0\0\0\0\0{\"a\":1}         ", 24));
  write("5-0.kv.safetensors", std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10));
  write("notes.safetensors", "mine");
  options_.limit_bytes = 20000;
  options_.refresh_seconds = 0.01;
  const auto store = OpenStore(folder_, options_);
  EXPECT_EQ(store->Numbers().files, 3);
  EXPECT_EQ(store->Numbers().refused[static_cast<int>(Problem::kDamaged)], 2);
  EXPECT_EQ(store->Numbers().refused[static_cast<int>(Problem::kTruncated)], 1);
  for (std::uint32_t i = 0; i < 5; ++i) ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), MakeTokens(4, i))));
  EXPECT_TRUE(std::filesystem::exists(path + "outside.txt"));
  EXPECT_TRUE(std::filesystem::exists(path + "notes.safetensors"));
  EXPECT_TRUE(std::filesystem::is_symlink(path + "0-0.kv.safetensors"));
}

TEST_F(StoreFaultsTest, WhatDeadWritersLeftGoesWhenAStoreIsOpenedOrPruned) {
  const auto leave = [&](const std::string& name, std::int64_t age) {
    const std::string path = folder_.path() + "/.writing-" + name;
    Fd file(open(path.c_str(), O_RDWR | O_CREAT, 0600));
    EXPECT_TRUE(file.ok());
    const timespec time = {::time(nullptr) - age, 0}, times[] = {time, time};
    EXPECT_EQ(futimens(file.get(), times), 0);
    return file;
  };
  const auto left = [&](const std::string& name) {
    return std::filesystem::exists(folder_.path() + "/.writing-" + name);
  };
  for (const bool prune : {false, true}) {
    leave("old", 100).Reset();
    leave("new", 1).Reset();
    const Fd used = leave("used", 100);
    ASSERT_EQ(flock(used.get(), LOCK_EX | LOCK_NB), 0);
    std::vector<std::string> removed;
    if (prune) {
      ASSERT_OK(Prune(folder_.path(), 1 << 20, 0, &removed));
    } else {
      OpenStore(folder_, options_)->Close();
    }
    EXPECT_FALSE(left("old"));
    EXPECT_TRUE(left("new")) << "its writer may not have locked it yet";
    EXPECT_TRUE(left("used"));
    EXPECT_TRUE(removed.empty());
  }
}

TEST_F(StoreFaultsTest, AFileOfAnotherVersionIsRefused) {
  FileHeader header;
  header.identity = {SmallShape(), "model", ""};
  header.tokens = MakeTokens(1, 1);
  header.checksums = {1};
  std::string bytes = EncodeHeader(header);
  const std::string version = "\"version\":\"1\"";
  bytes.replace(bytes.find(version), version.size(), "\"version\":\"2\"");
  FileHeader out;
  EXPECT_EQ(DecodeHeader(bytes, &out), Problem::kVersion);
}

TEST_F(StoreFaultsTest, CloseEndsReadsAndWritesThatAreUnderWay) {
  options_.readers = 1;
  options_.writers = 1;
  const auto store = OpenStore(folder_, options_);
  const Tokens tokens = MakeTokens(4, 1);
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), tokens)));
  io_->hold_reads = true;
  std::vector<std::shared_ptr<ReadTicket>> tickets;
  std::vector<std::shared_ptr<Blocks>> memory;
  for (int i = 0; i < 3; ++i) {
    memory.push_back(std::make_shared<Blocks>(SmallShape(), 4));
    tickets.push_back(store->Read({SmallShape(), "", tokens, 0, memory.back()->ranges, memory.back()}));
  }
  std::thread let_go([&] {
    usleep(50000);
    io_->hold_reads = false;
  });
  store->Close();
  let_go.join();
  for (const auto& ticket : tickets) EXPECT_TRUE(ticket->ready());
  EXPECT_EQ(tickets[2]->blocks(), 0);
  EXPECT_EQ(tickets[2]->problem(), Problem::kClosed);
  EXPECT_EQ(memory[2].use_count(), 1);  // no write uses it any more
  store->Close();
  WriteRun run = MakeRun(SmallShape(), tokens);
  EXPECT_FALSE(store->Write(run));
  EXPECT_EQ(store->Find(SmallShape(), "", tokens.data(), 16), 0);
  EXPECT_EQ(store->Check("look").reason(), Reason::kClosed);
  EXPECT_EQ(ReadBack(OpenStore(folder_, options_).get(), SmallShape(), tokens), 4);
}

TEST_F(StoreFaultsTest, QueuedWritesAreToldOfTheClose) {
  options_.writers = 1;
  const auto store = OpenStore(folder_, options_);
  std::atomic<int> done{0}, closed{0};
  for (std::uint32_t i = 0; i < 8; ++i) {
    WriteRun run = MakeRun(SmallShape(), MakeTokens(50, i));
    run.done = [&](const Status& status) {
      ++done;
      if (status.reason() == Reason::kClosed) ++closed;
    };
    ASSERT_TRUE(store->Write(run));
  }
  store->Close();
  EXPECT_EQ(done, 8);
  EXPECT_EQ(folder_.files().size(), static_cast<std::size_t>(8 - closed));
}

#if !defined(__SANITIZE_THREAD__)  // it does not support forks of processes with threads
TEST_F(StoreFaultsTest, AForkedChildHasNoStoreAndTheParentKeepsIts) {
  options_.refresh_seconds = 0.001;
  auto store = OpenStore(folder_, options_);
  const Tokens tokens = MakeTokens(4, 1);
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), tokens)));
  const pid_t child = fork();
  if (child == 0) {
    WriteRun run = MakeRun(SmallShape(), MakeTokens(4, 2));
    const bool ok = store->Check("look").reason() == Reason::kForked && !store->Write(run) &&
                    store->Find(SmallShape(), "", tokens.data(), 16) == 0 && store->Numbers().files == 0;
    store->Close();
    store.reset();
    _exit(ok ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(ReadBack(store.get(), SmallShape(), tokens), 4);
}

TEST_F(StoreFaultsTest, AKilledWriterLeavesWholeFilesOnly) {
  const BlockShape shape = SmallShape(100 << 10);
  for (int round = 0; round < 20; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      const auto store = OpenStore(folder_, SmallOptions());
      for (std::uint32_t i = 0;; ++i) static_cast<void>(WriteNow(store.get(), MakeRun(shape, MakeTokens(8, i))));
    }
    usleep(2000 + round * 3000);
    kill(child, SIGKILL);
    ASSERT_EQ(waitpid(child, nullptr, 0), child);
    std::vector<FileReport> reports;
    ASSERT_OK(ListFiles(folder_.path(), /*verify=*/true, &reports));
    for (const FileReport& report : reports) EXPECT_EQ(report.problem, Problem::kNone) << report.name;
    for (const FileReport& report : reports) std::filesystem::remove(folder_.path() + "/" + report.name);
  }
}
#endif

}  // namespace
}  // namespace kvpage::store::testing
