// A store of small blocks whose bytes are derived from their tokens, so that any wrong byte is noticed.
#ifndef KVPAGE_TESTS_STORE_UTIL_H_
#define KVPAGE_TESTS_STORE_UTIL_H_

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "store/block_store.h"
#include "tests/expect_ok.h"

namespace kvpage::store::testing {

using Tokens = std::vector<std::int32_t>;

class TemporaryFolder {
 public:
  TemporaryFolder() {
    // mkdtemp replaces the X's.
    std::string name = (std::filesystem::temp_directory_path() / "kvpage-store-XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~TemporaryFolder() {
    std::filesystem::permissions(path_, std::filesystem::perms::owner_all);
    std::filesystem::remove_all(path_);
  }
  const std::string& path() const { return path_; }
  // Returns the names of the block files in it.
  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path_)) {
      if (entry.path().extension() == ".safetensors") names.push_back(entry.path().string());
    }
    std::sort(names.begin(), names.end());
    return names;
  }
  std::size_t entries() const {
    return std::distance(std::filesystem::directory_iterator(path_), std::filesystem::directory_iterator());
  }

 private:
  std::string path_;
};

inline BlockShape SmallShape(std::int64_t block_bytes = 1000) { return {"small", 4, 2, block_bytes}; }

// Returns `blocks` blocks of tokens determined by a seed; the first `common` blocks are those of seed 0.
inline Tokens MakeTokens(std::int64_t blocks, std::uint32_t seed, std::int64_t common = 0) {
  Tokens tokens;
  for (std::int64_t i = 0; i < blocks * 4; ++i) {
    tokens.push_back(static_cast<std::int32_t>((i + 1) * 7919 + (i < common * 4 ? 0 : seed * 104729)));
  }
  return tokens;
}

// The bytes of blocks [begin, end) of a sequence, and the address of each of their ranges.
struct Blocks {
  Blocks(const BlockShape& shape, std::int64_t count) : bytes(count * shape.bytes()) {
    for (std::int64_t i = 0; i < count * shape.ranges; ++i) ranges.push_back(bytes.data() + i * shape.block_bytes);
  }
  std::vector<char> bytes;
  std::vector<char*> ranges;  // [blocks, ranges]
};

inline std::shared_ptr<Blocks> MakeBlocks(const Identity& identity, const Tokens& tokens, std::int64_t begin,
                                          std::int64_t end) {
  auto blocks = std::make_shared<Blocks>(identity.shape, end - begin);
  char* at = blocks->bytes.data();
  for (std::int64_t block = begin; block < end; ++block) {
    std::minstd_rand random(static_cast<std::uint32_t>(HashPrefix(identity, tokens.data(), block + 1)));
    for (std::int64_t i = 0; i < identity.shape.bytes(); ++i) *at++ = static_cast<char>(random() >> 8);
  }
  return blocks;
}

inline WriteRun MakeRun(const BlockShape& shape, const Tokens& tokens, std::int64_t begin = 0,
                        const std::string& space = "", const std::string& fingerprint = "model") {
  WriteRun run;
  run.shape = shape;
  run.space = space;
  run.tokens = tokens;
  run.first_block = begin;
  const std::int64_t end = static_cast<std::int64_t>(tokens.size()) / shape.block_tokens;
  const auto blocks = MakeBlocks({shape, fingerprint, space}, tokens, begin, end);
  run.sources.assign(blocks->ranges.begin(), blocks->ranges.end());
  run.keep = blocks;
  return run;
}

inline StoreOptions SmallOptions() {
  StoreOptions options;
  options.fingerprint = "model";
  options.refresh_seconds = 0.01;
  return options;
}

inline std::unique_ptr<BlockStore> OpenStore(const TemporaryFolder& folder, const StoreOptions& options) {
  std::unique_ptr<BlockStore> store;
  EXPECT_OK(BlockStore::Open(folder.path(), options, &store));
  return store;
}

// Writes a run and waits for it.
inline Status WriteNow(BlockStore* store, WriteRun run) {
  struct Result {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    Status status;
  };
  const auto result = std::make_shared<Result>();
  run.done = [result](const Status& status) {
    const std::lock_guard<std::mutex> lock(result->mutex);
    result->done = true;
    result->status = status;
    result->changed.notify_all();
  };
  if (!store->Write(run)) return ResourceExhausted("dropped");
  std::unique_lock<std::mutex> lock(result->mutex);
  result->changed.wait(lock, [&] { return result->done; });
  return result->status;
}

// Reads the blocks of a sequence from `begin` on and compares them. Returns how many there are.
inline std::int64_t ReadBack(BlockStore* store, const BlockShape& shape, const Tokens& tokens, std::int64_t begin = 0,
                             const std::string& space = "", Problem* problem = nullptr) {
  const std::int64_t end = static_cast<std::int64_t>(tokens.size()) / shape.block_tokens;
  const auto blocks = std::make_shared<Blocks>(shape, end - begin);
  ReadRequest request{shape, space, tokens, begin, blocks->ranges, blocks};
  const std::shared_ptr<ReadTicket> ticket = store->Read(std::move(request));
  EXPECT_TRUE(ticket->Wait(60));
  const std::int64_t good = ticket->blocks();
  const auto wanted = MakeBlocks({shape, store->options().fingerprint, space}, tokens, begin, end);
  EXPECT_EQ(std::memcmp(blocks->bytes.data(), wanted->bytes.data(), good * shape.bytes()), 0);
  if (problem != nullptr) *problem = ticket->problem();
  return good;
}

// Returns whether a condition becomes true within some seconds.
template <class Condition>
bool Soon(const Condition& condition) {
  for (int i = 0; i < 2000; ++i) {
    if (condition()) return true;
    usleep(10000);
  }
  return false;
}

}  // namespace kvpage::store::testing

#endif  // KVPAGE_TESTS_STORE_UTIL_H_
