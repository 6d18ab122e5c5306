// PrefixEvents: records what the prefix index stores and removes, for readers that keep a copy of it elsewhere
// (routers, indexers).
//
// Replaying the events always gives the full blocks of the index; partial blocks are not published, as in vLLM. The
// record is bounded: if it overflows, it is discarded, and the next reader gets the whole index again.
#ifndef KVPAGE_CACHE_PREFIX_EVENTS_H_
#define KVPAGE_CACHE_PREFIX_EVENTS_H_

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace kvpage {

struct PrefixEvent {
  enum class Kind { kStored, kRemoved, kCleared };

  Kind kind = Kind::kCleared;
  // Identifies the block together with all blocks before it, in all processes. Hash collisions are possible but rare:
  // compare tokens where it matters.
  std::uint64_t hash = 0;
  // Only for stored blocks:
  std::int32_t space = 0;
  std::uint64_t parent = 0;  // hash of the block before it; 0 for the first block
  std::vector<std::int32_t> tokens;
};

class PrefixEvents {
 public:
  // Keeps up to `most` events until they are taken; 0 disables recording.
  void Start(std::size_t most) {
    most_ = most;
    Forget();
  }
  bool recording() const { return most_ > 0; }
  // Events were discarded or not recorded from the start, so the reader needs all blocks.
  bool incomplete() const { return incomplete_; }

  void Add(PrefixEvent event) {
    if (incomplete_) return;
    if (events_.size() == most_) return Forget();
    events_.push_back(std::move(event));
  }
  // Returns the events since the last call.
  std::vector<PrefixEvent> Take() {
    incomplete_ = false;
    return std::exchange(events_, {});
  }

 private:
  void Forget() {
    events_ = {};
    incomplete_ = true;
  }

  std::size_t most_ = 0;
  bool incomplete_ = true;
  std::vector<PrefixEvent> events_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PREFIX_EVENTS_H_
