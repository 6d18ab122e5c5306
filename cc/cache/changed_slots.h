// ChangedSlots: the slots that have changed since the last call of Take, each once. No locks: those of its owner guard
// it.
#ifndef KVPAGE_CACHE_CHANGED_SLOTS_H_
#define KVPAGE_CACHE_CHANGED_SLOTS_H_

#include <cstdint>
#include <utility>
#include <vector>

namespace kvpage {

class ChangedSlots {
 public:
  explicit ChangedSlots(std::int64_t num_slots) : noted_(num_slots, false) {}

  void Note(std::int64_t slot) {
    if (noted_[slot]) return;
    noted_[slot] = true;
    slots_.push_back(static_cast<std::int32_t>(slot));
  }
  std::vector<std::int32_t> Take() {
    for (const std::int32_t slot : slots_) noted_[slot] = false;
    return std::exchange(slots_, {});
  }

 private:
  std::vector<bool> noted_;  // [slots]
  std::vector<std::int32_t> slots_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_CHANGED_SLOTS_H_
