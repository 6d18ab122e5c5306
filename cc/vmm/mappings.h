// Memory mappings as a resource of the process: how many a pool may need, and how many were promised to pools.
//
// Linux limits the mappings of a process (vm.max_map_count). Thread stacks and compiled programs use the same limit as
// pools, and a failed mapping in LLVM ends the process. So pools leave a reserve, and the worst case of a pool is
// counted from its creation, because its mappings are made later.
#ifndef KVPAGE_VMM_MAPPINGS_H_
#define KVPAGE_VMM_MAPPINGS_H_

#include <atomic>
#include <cstdint>
#include <string>

namespace kvpage {

// The most mappings that a pool needs with `blocks` physical blocks and `ranges` virtual ranges (over all slots) of
// `blocks_per_range` blocks: no two mapped blocks can be merged, and each range with blocks ends in a hole.
std::int64_t WorstMappings(std::int64_t blocks, std::int64_t ranges, std::int64_t blocks_per_range);

// The most blocks for which WorstMappings is at most `mappings`; 0 if there are none.
std::int64_t MostBlocks(std::int64_t mappings, std::int64_t ranges);

// What was promised to the pools of a process. Lock-free, so that a forked child can use it at any time.
class MapAccount {
 public:
  struct Limits {
    std::int64_t total = 0;   // vm.max_map_count
    std::int64_t others = 0;  // mappings of the process that are not for pools
  };
  // kNow: read the limits for this promise, which takes about 1 ms in a process with JAX. kRecent: use the latest
  // reading if few mappings have been promised since.
  enum class Reading { kNow, kRecent };
  using ReadLimits = Limits (*)();

  explicit MapAccount(ReadLimits read) : read_(read) {}
  MapAccount(const MapAccount&) = delete;
  MapAccount& operator=(const MapAccount&) = delete;

  std::int64_t promised() const { return promised_; }
  // How many more can be promised now.
  std::int64_t Left() const;
  // How many mappings a pool that can still choose its block size should need at most, so that some are left for later
  // pools.
  std::int64_t Share() const;
  // Left() as a sum, for messages.
  std::string Describe() const;

 private:
  friend class MapPromise;
  bool Promise(std::int64_t more, Reading reading);
  // Adds to promised_ unless the sum would exceed `allowed`.
  bool Add(std::int64_t more, std::int64_t allowed);

  const ReadLimits read_;
  std::atomic<std::int64_t> promised_{0};
  // The latest reading: the mappings it allowed for all pools, how many may be promised without another reading, and
  // how many were promised since. Mappings returned since then are not subtracted.
  std::atomic<std::int64_t> allowed_{0};
  std::atomic<std::int64_t> most_unread_{0};
  std::atomic<std::int64_t> unread_{0};
};

// The account of this process.
MapAccount& ProcessMapAccount();

// A pool's share in an account; returned on destruction.
class MapPromise {
 public:
  // `account` is null for memory that uses no mappings of the process (device memory): any number is then granted.
  explicit MapPromise(MapAccount* account) : account_(account) {}
  ~MapPromise() { static_cast<void>(Change(0)); }
  MapPromise(const MapPromise&) = delete;
  MapPromise& operator=(const MapPromise&) = delete;

  MapAccount* account() const { return account_; }
  std::int64_t mappings() const { return mappings_; }
  // The most mappings that this promise could have.
  std::int64_t Most() const { return account_->Left() + mappings_; }
  // Changes the number of mappings. If more are requested than are left, returns false and changes nothing; the limits
  // are always read before that. Reductions are always granted.
  bool Change(std::int64_t mappings, MapAccount::Reading reading = MapAccount::Reading::kNow);

 private:
  MapAccount* const account_;
  std::int64_t mappings_ = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_MAPPINGS_H_
