// BlockStore: what is written is found and read, by this and other processes, within a limit.
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "store/folder.h"
#include "store/inspect.h"
#include "tests/store_util.h"

namespace kvpage::store::testing {
namespace {

std::int64_t FoundTokens(BlockStore* store, const Tokens& tokens, const std::string& space = "") {
  return store->Find(SmallShape(), space, tokens.data(), static_cast<std::int64_t>(tokens.size()));
}

TEST(StoreTest, AHeaderSurvivesAndEveryChangeOfItIsNoticed) {
  FileHeader header;
  header.identity = {SmallShape(), "a \"model\"\\\n", std::string("name\x01 \xc3\xa9")};
  header.first_block = 2;
  header.tokens = {-5, 0, 7, 2147483647, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, -2147483647 - 1};
  header.checksums = {0xffffffff, 0};
  const std::string bytes = EncodeHeader(header);
  EXPECT_EQ(bytes.size() % kDataAlignment, 0u);
  FileHeader out;
  ASSERT_EQ(DecodeHeader(bytes, &out), Problem::kNone);
  EXPECT_TRUE(out.identity == header.identity);
  EXPECT_EQ(out.tokens, header.tokens);
  EXPECT_EQ(out.checksums, header.checksums);
  EXPECT_EQ(out.first_block, 2);
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    for (const int bit : {0, 3, 7}) {
      std::string changed = bytes;
      changed[i] = static_cast<char>(changed[i] ^ (1 << bit));
      EXPECT_NE(DecodeHeader(changed, &out), Problem::kNone) << "byte " << i;
    }
  }
  for (std::size_t size = 0; size < bytes.size(); size += 13) {
    EXPECT_NE(DecodeHeader(bytes.substr(0, size), &out), Problem::kNone);
  }
}

TEST(StoreTest, WhatIsWrittenIsFoundAndRead) {
  const TemporaryFolder folder;
  const auto store = OpenStore(folder, SmallOptions());
  const Tokens a = MakeTokens(10, 1), b = MakeTokens(8, 2, /*common=*/5);
  const Tokens first(a.begin(), a.begin() + 12), wrong = MakeTokens(10, 3);
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), a)));
  EXPECT_EQ(FoundTokens(store.get(), a), 40);
  EXPECT_EQ(FoundTokens(store.get(), first), 12);
  EXPECT_EQ(FoundTokens(store.get(), Tokens(a.begin(), a.begin() + 11)), 8);  // full blocks only
  EXPECT_EQ(FoundTokens(store.get(), b), 0);
  EXPECT_EQ(FoundTokens(store.get(), wrong), 0);
  EXPECT_EQ(FoundTokens(store.get(), a, "other"), 0);
  EXPECT_EQ(ReadBack(store.get(), SmallShape(), a), 10);
  EXPECT_EQ(ReadBack(store.get(), SmallShape(), a, 7), 3);
  EXPECT_EQ(ReadBack(store.get(), SmallShape(), first), 3);
  Problem problem = Problem::kNone;
  EXPECT_EQ(ReadBack(store.get(), SmallShape(), wrong, 0, "", &problem), 0);
  EXPECT_EQ(problem, Problem::kGone);
  // A longer sequence adds only what is new.
  Tokens longer = a;
  for (int i = 0; i < 8; ++i) longer.push_back(i);
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), longer)));
  EXPECT_EQ(store->Numbers().blocks_written, 12);
  EXPECT_EQ(ReadBack(store.get(), SmallShape(), longer), 12);
  EXPECT_EQ(store->Numbers().files, 2);
  // Only the user may access the files.
  for (const std::string& name : folder.files()) {
    struct stat status;
    ASSERT_EQ(stat(name.c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777, 0600u);
  }
}

TEST(StoreTest, ARunIsSplitIntoFilesAndReadInPieces) {
  const TemporaryFolder folder;
  StoreOptions options = SmallOptions();
  options.file_bytes = std::int64_t{5} << 20;
  const BlockShape shape = SmallShape(300 << 10);
  const auto store = OpenStore(folder, options);
  const Tokens tokens = MakeTokens(40, 1);
  ASSERT_OK(WriteNow(store.get(), MakeRun(shape, tokens)));
  EXPECT_EQ(store->Numbers().files, 5);
  EXPECT_EQ(ReadBack(store.get(), shape, tokens), 40);
  EXPECT_EQ(ReadBack(store.get(), shape, tokens, 13), 27);
  EXPECT_EQ(store->Numbers().blocks_read, 67);
}

TEST(StoreTest, ARestartFindsEverything) {
  const TemporaryFolder folder;
  for (std::uint32_t i = 0; i < 20; ++i) {
    const auto store = OpenStore(folder, SmallOptions());
    for (std::uint32_t seed = 0; seed < i; ++seed) {
      const Tokens tokens = MakeTokens(6, seed, 2);
      EXPECT_EQ(FoundTokens(store.get(), tokens), 24);
      EXPECT_EQ(ReadBack(store.get(), SmallShape(), tokens), 6);
    }
    ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), MakeTokens(6, i, 2))));
  }
}

TEST(StoreTest, FilesOfOtherStoresOnThePathComeAndGo) {
  const TemporaryFolder folder;
  const auto writer = OpenStore(folder, SmallOptions()), reader = OpenStore(folder, SmallOptions());
  const Tokens tokens = MakeTokens(3, 1);
  ASSERT_OK(WriteNow(writer.get(), MakeRun(SmallShape(), tokens)));
  EXPECT_TRUE(Soon([&] { return FoundTokens(reader.get(), tokens) == 12; }));
  EXPECT_EQ(ReadBack(reader.get(), SmallShape(), tokens), 3);
  std::filesystem::remove(folder.files()[0]);
  EXPECT_TRUE(Soon([&] { return FoundTokens(reader.get(), tokens) == 0; }));
  EXPECT_TRUE(Soon([&] { return writer->Numbers().bytes == 0; }));
}

TEST(StoreTest, OtherModelsGeometriesAndNamespacesAreNotFound) {
  const TemporaryFolder folder;
  const Tokens tokens = MakeTokens(3, 1);
  {
    const auto store = OpenStore(folder, SmallOptions());
    ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), tokens, 0, "tenant")));
    BlockShape other = SmallShape();
    other.layout = "large";
    EXPECT_EQ(store->Find(other, "tenant", tokens.data(), 12), 0);
    EXPECT_EQ(store->Numbers().missed[static_cast<int>(Problem::kGeometry)], 1);
    EXPECT_EQ(FoundTokens(store.get(), tokens), 0);
    EXPECT_EQ(FoundTokens(store.get(), tokens, "tenant"), 12);
  }
  StoreOptions options = SmallOptions();
  options.fingerprint = "another model";
  const auto store = OpenStore(folder, options);
  EXPECT_EQ(FoundTokens(store.get(), tokens, "tenant"), 0);
  EXPECT_EQ(store->Numbers().refused[static_cast<int>(Problem::kFingerprint)], 1);
  EXPECT_TRUE(store->Runs(SmallShape()).empty());
}

TEST(StoreTest, TheLimitEvictsTheLeastRecentlyUsedButNoPrefixBeforeWhatContinuesIt) {
  const TemporaryFolder folder;
  StoreOptions options = SmallOptions();
  options.limit_bytes = 4 * (4096 + 4 * 2000) + 100;  // four files
  options.refresh_seconds = 1000;
  const auto store = OpenStore(folder, options);
  const Tokens a = MakeTokens(8, 1);
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), Tokens(a.begin(), a.begin() + 16))));
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), a, 4)));
  std::vector<Tokens> others;
  for (std::uint32_t seed = 2; seed < 4; ++seed) others.push_back(MakeTokens(4, seed));
  for (const Tokens& tokens : others) ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), tokens)));
  EXPECT_EQ(store->Numbers().files, 4);
  // The sequence that was read stays; of the others, the older one is evicted.
  usleep(20000);
  EXPECT_EQ(ReadBack(store.get(), SmallShape(), a, 4), 4);  // reads only its second file
  usleep(20000);
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), MakeTokens(4, 9))));
  EXPECT_EQ(store->Numbers().files, 4);
  EXPECT_EQ(FoundTokens(store.get(), a), 32);
  EXPECT_EQ(FoundTokens(store.get(), others[0]), 0);
  EXPECT_EQ(FoundTokens(store.get(), others[1]), 16);
  EXPECT_EQ(store->Numbers().files_evicted, 1);
  EXPECT_EQ(folder.files().size(), 4u);
  // What can never fit is refused.
  EXPECT_EQ(WriteNow(store.get(), MakeRun(SmallShape(), MakeTokens(40, 5))).code(), Code::kResourceExhausted);
}

TEST(StoreTest, WhatASequenceContinuesIsNotEvictedForIt) {
  const TemporaryFolder folder;
  StoreOptions options = SmallOptions();
  options.limit_bytes = 3 * (4096 + 4 * 2000) + 100;  // three files
  options.refresh_seconds = 1000;
  const auto store = OpenStore(folder, options);
  const Tokens a = MakeTokens(16, 1), other = MakeTokens(4, 2);
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), Tokens(a.begin(), a.begin() + 16))));
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), Tokens(a.begin(), a.begin() + 32), 4)));
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), other)));
  // The newer file of another sequence is evicted, not those that the third part continues.
  ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), Tokens(a.begin(), a.begin() + 48), 8)));
  EXPECT_EQ(FoundTokens(store.get(), a), 48);
  EXPECT_EQ(FoundTokens(store.get(), other), 0);
  EXPECT_EQ(WriteNow(store.get(), MakeRun(SmallShape(), a, 12)).code(), Code::kResourceExhausted);
  EXPECT_EQ(FoundTokens(store.get(), a), 48);
  EXPECT_EQ(folder.files().size(), 3u);
}

TEST(StoreTest, OneProcessEvictsAtATime) {
  const TemporaryFolder folder;
  StoreOptions options = SmallOptions();
  options.limit_bytes = 20000;
  const auto store = OpenStore(folder, options);
  Folder other;
  ASSERT_OK(Folder::Find(folder.path(), &other));
  FolderLock lock = other.TryLock();
  ASSERT_TRUE(lock.ok());
  for (std::uint32_t i = 0; i < 4; ++i) ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), MakeTokens(4, i))));
  EXPECT_EQ(folder.files().size(), 4u);
  lock.Reset();
  EXPECT_TRUE(Soon([&] { return folder.files().size() == 1; }));
}

TEST(StoreTest, WhatOtherProcessesWriteCountsBelowTheLimit) {
  const TemporaryFolder folder;
  StoreOptions options = SmallOptions();
  options.limit_bytes = 60000;  // four files
  options.refresh_seconds = 1000;
  const auto one = OpenStore(folder, options), other = OpenStore(folder, options);
  const auto size = [&] {
    std::uintmax_t bytes = 0;
    for (const std::string& name : folder.files()) bytes += std::filesystem::file_size(name);
    return bytes;
  };
  for (std::uint32_t i = 0; i < 6; ++i) ASSERT_OK(WriteNow(one.get(), MakeRun(SmallShape(), MakeTokens(4, i))));
  EXPECT_GT(size(), 40000u);
  usleep(300000);  // the directory is not listed all the time
  ASSERT_OK(WriteNow(other.get(), MakeRun(SmallShape(), MakeTokens(4, 9))));
  EXPECT_LE(size(), 60000u);
  EXPECT_EQ(ReadBack(other.get(), SmallShape(), MakeTokens(4, 9)), 4);
}

TEST(StoreTest, AFullQueueDropsAndCounts) {
  const TemporaryFolder folder;
  StoreOptions options = SmallOptions();
  options.most_queued_bytes = 20000;
  options.writers = 1;
  struct Slow : FileIo {
    int Sync(int) override {
      while (!go) usleep(1000);
      return 0;
    }
    std::atomic<bool> go{false};
  };
  const auto slow = std::make_shared<Slow>();
  options.io = slow;
  const auto store = OpenStore(folder, options);
  std::vector<bool> taken;
  for (std::uint32_t i = 0; i < 4; ++i) {
    WriteRun run = MakeRun(SmallShape(), MakeTokens(4, i));
    taken.push_back(store->Write(run));
    EXPECT_EQ(run.sources.empty(), taken.back());  // a dropped run is left alone
  }
  EXPECT_EQ(taken, (std::vector<bool>{true, true, false, false}));
  EXPECT_EQ(store->Numbers().runs_dropped, 2);
  EXPECT_EQ(store->Numbers().bytes_queued, 16000);
  EXPECT_FALSE(store->WaitForRoom(8000, 0.01));
  slow->go = true;
  EXPECT_TRUE(store->WaitForRoom(20000, 60));
  EXPECT_EQ(FoundTokens(store.get(), MakeTokens(4, 1)), 16);
}

TEST(StoreTest, ManyThreadsWriteAndRead) {
  const TemporaryFolder folder;
  StoreOptions options = SmallOptions();
  options.limit_bytes = 300000;
  const auto one = OpenStore(folder, options), two = OpenStore(folder, options);
  std::vector<std::thread> threads;
  std::atomic<std::int64_t> read{0};
  for (std::uint32_t i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      BlockStore* const store = i % 2 == 0 ? one.get() : two.get();
      for (std::uint32_t n = 0; n < 25; ++n) {
        const Tokens tokens = MakeTokens(4 + n % 5, (i * 7 + n) % 12, n % 4);
        static_cast<void>(WriteNow(store, MakeRun(SmallShape(), tokens)));
        read += ReadBack(store, SmallShape(), MakeTokens(6, n % 12, 2));
        static_cast<void>(store->Numbers());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(read, 0);
}

TEST(StoreTest, ThreadsThatWriteBesideEachOtherFindRoom) {
  const TemporaryFolder folder;
  StoreOptions options = SmallOptions();
  options.limit_bytes = 4 * (4096 + 4 * 2000) + 100;  // four files
  const auto one = OpenStore(folder, options), two = OpenStore(folder, options);
  std::vector<std::thread> threads;
  for (std::uint32_t i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      BlockStore* const store = i % 2 == 0 ? one.get() : two.get();
      for (std::uint32_t n = 0; n < 100; ++n) {
        EXPECT_OK(WriteNow(store, MakeRun(SmallShape(), MakeTokens(4, 100 * i + n + 1))));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(StoreTest, InspectionListsVerifiesAndPrunes) {
  const TemporaryFolder folder;
  {
    const auto store = OpenStore(folder, SmallOptions());
    for (std::uint32_t i = 0; i < 3; ++i) ASSERT_OK(WriteNow(store.get(), MakeRun(SmallShape(), MakeTokens(4, i))));
  }
  std::vector<FileReport> reports;
  ASSERT_OK(ListFiles(folder.path(), /*verify=*/true, &reports));
  ASSERT_EQ(reports.size(), 3u);
  for (const FileReport& report : reports) {
    EXPECT_EQ(report.problem, Problem::kNone);
    EXPECT_EQ(report.header.tokens.size(), 16u);
  }
  {
    const Fd file(open(folder.files()[1].c_str(), O_WRONLY));
    ASSERT_EQ(pwrite(file.get(), "x", 1, 4096 + 5000), 1);
  }
  ASSERT_OK(ListFiles(folder.path(), /*verify=*/false, &reports));
  EXPECT_EQ(reports[1].problem, Problem::kNone);
  ASSERT_OK(ListFiles(folder.path(), /*verify=*/true, &reports));
  EXPECT_EQ(reports[1].problem, Problem::kDamaged);
  std::vector<std::string> removed;
  ASSERT_OK(Prune(folder.path(), 2 * reports[0].bytes, 0, &removed));
  EXPECT_EQ(removed.size(), 1u);
  ASSERT_OK(Prune(folder.path(), 1 << 30, Folder::Now() + 1, &removed));
  EXPECT_EQ(removed.size(), 2u);
  EXPECT_EQ(ListFiles(folder.path() + "/missing", false, &reports).code(), Code::kFailedPrecondition);
}

}  // namespace
}  // namespace kvpage::store::testing
