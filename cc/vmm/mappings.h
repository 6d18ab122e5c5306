// Memory mappings as a resource of the process: how many a pool may come to need, and how many pools were promised.
//
// Linux limits the mappings of a process (vm.max_map_count). Thread stacks and compiled programs draw on the same
// limit as pools do, and a mapping that fails in LLVM ends the process. Pools therefore leave a reserve, and the worst
// case of a pool counts from the day it is made, because its mappings come later.
#ifndef KVPAGE_VMM_MAPPINGS_H_
#define KVPAGE_VMM_MAPPINGS_H_

#include <atomic>
#include <cstdint>
#include <string>

namespace kvpage {

// The most mappings that a pool needs with `blocks` physical blocks and `ranges` virtual ranges (of all slots together)
// of `blocks_per_range` blocks: no two mapped blocks are neighbours, and each range that has some ends in a hole.
std::int64_t WorstMappings(std::int64_t blocks, std::int64_t ranges, std::int64_t blocks_per_range);

// The most blocks for which WorstMappings is at most `mappings`; 0 if there are none.
std::int64_t MostBlocks(std::int64_t mappings, std::int64_t ranges);

// What was promised to the pools of a process. Without a lock, so that a forked child can use it at any time.
class MapAccount {
 public:
  struct Limits {
    std::int64_t total = 0;   // vm.max_map_count
    std::int64_t others = 0;  // mappings that the process has for something else than pools
  };
  // kNow: the limits are read for this promise, about 1 ms for a process with JAX. kRecent: those of the last reading
  // will do, if few mappings have been promised since.
  enum class Reading { kNow, kRecent };
  using ReadLimits = Limits (*)();

  explicit MapAccount(ReadLimits read) : read_(read) {}
  MapAccount(const MapAccount&) = delete;
  MapAccount& operator=(const MapAccount&) = delete;

  std::int64_t promised() const { return promised_; }
  // How many more can be promised now.
  std::int64_t Left() const;
  // How many a pool should need at most that may still choose the size of its blocks, so that pools to come find some.
  std::int64_t Share() const;
  // Left() as a sum, for messages.
  std::string Describe() const;

 private:
  friend class MapPromise;
  bool Promise(std::int64_t more, Reading reading);
  // Adds to promised_ unless that makes more than `allowed`.
  bool Add(std::int64_t more, std::int64_t allowed);

  const ReadLimits read_;
  std::atomic<std::int64_t> promised_{0};
  // The last reading: the mappings that it allowed all pools, how many may be promised without another one, and how
  // many were promised since. What was given back in between is not subtracted.
  std::atomic<std::int64_t> allowed_{0};
  std::atomic<std::int64_t> most_unread_{0};
  std::atomic<std::int64_t> unread_{0};
};

// The account of this process.
MapAccount& ProcessMapAccount();

// A pool's entry in an account; given back when it ends.
class MapPromise {
 public:
  // Null: memory that takes no mappings of the process (a device's). It is promised any number.
  explicit MapPromise(MapAccount* account) : account_(account) {}
  ~MapPromise() { static_cast<void>(Change(0)); }
  MapPromise(const MapPromise&) = delete;
  MapPromise& operator=(const MapPromise&) = delete;

  MapAccount* account() const { return account_; }
  std::int64_t mappings() const { return mappings_; }
  // Mappings that this promise could have.
  std::int64_t Most() const { return account_->Left() + mappings_; }
  // False, and nothing has changed, when more are wanted than are left; the limits are always read before a refusal.
  // Fewer are always granted.
  bool Change(std::int64_t mappings, MapAccount::Reading reading = MapAccount::Reading::kNow);

 private:
  MapAccount* const account_;
  std::int64_t mappings_ = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_MAPPINGS_H_
