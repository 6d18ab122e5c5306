// PrefixEvents: what the prefix index stored and removed, for those who keep a copy of it elsewhere (routers,
// indexers).
//
// Replaying the events always gives the whole blocks of the index; partial blocks are not published, as in vLLM. The
// record is bounded: what does not fit is forgotten, and the next reader gets the whole index anew.
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
  // Names the block together with all before it, in all processes. Different blocks may have equal hashes, though this
  // is rare: compare tokens where it matters.
  std::uint64_t hash = 0;
  // Of a stored block:
  std::int32_t space = 0;
  std::uint64_t parent = 0;  // hash of the block before it; 0: it is the first
  std::vector<std::int32_t> tokens;
};

class PrefixEvents {
 public:
  // Keeps up to `most` events until they are taken; 0: none, and nothing is recorded.
  void Start(std::size_t most) {
    most_ = most;
    Forget();
  }
  bool recording() const { return most_ > 0; }
  // Events were forgotten, or not recorded from the start: the reader needs all blocks.
  bool incomplete() const { return incomplete_; }

  void Add(PrefixEvent event) {
    if (incomplete_) return;
    if (events_.size() == most_) return Forget();
    events_.push_back(std::move(event));
  }
  // The events since the last call. What is recorded from now on follows them.
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
