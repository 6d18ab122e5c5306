// Candidates: the slots that a request may adopt, and the slots that can give blocks, each in order.
//
// This is an index over the slot table and the arena. Supply::Refresh updates it with the slots that have changed, so
// the cost of a claim depends on the number of changes, not of slots. It knows how many blocks a slot maps, but not
// which: slots may share blocks, and the arena determines how many blocks such a slot can really give
// (Arena::ExclusiveTail). Bookkeeping only, no locks: supply's mapping mutex guards it.
#ifndef KVPAGE_CACHE_CANDIDATES_H_
#define KVPAGE_CACHE_CANDIDATES_H_

#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "cache/supply_plan.h"

namespace kvpage {

// The state of one slot in the index.
struct Standing {
  bool idle = true;         // nobody owns it and no view holds it: it may be adopted
  bool draining = false;    // its blocks will become free without further action
  std::int64_t blocks = 0;  // logical blocks mapped
  std::int64_t fit = 0;     // blocks that a new owner may have; negative if it must give them up first
  std::int64_t spare = 0;   // blocks at its end that it does not need
  std::uint64_t order = 0;  // donors with smaller numbers give first; ties go to the lower slot
};

class Candidates {
 public:
  // Initially every slot is idle and empty.
  explicit Candidates(std::int64_t num_slots) : num_slots_(num_slots) {}

  void Update(std::int32_t slot, const Standing& now);
  Standing standing(std::int32_t slot) const { return slot < num_known() ? standings_[slot] : Standing(); }

  // Chooses an idle slot for each entry of `blocks` (the logical blocks of a request) in turn; returns fewer if there
  // are not enough idle slots. Chooses the smallest slot that suffices, or else the largest; ties go to the lowest
  // number. Slots that must give up their blocks come last.
  std::vector<std::int32_t> BestFits(const std::vector<std::int64_t>& blocks);

  // The idle slots with the fewest blocks; fewer than `count` if there are not as many.
  std::vector<std::int32_t> FewestBlocks(std::size_t count);

  // Calls visit(donor) for the slots with spare blocks, in the order in which they give blocks, until it returns false.
  template <class Visit>
  void ForEachDonor(Visit visit) const {
    for (const auto& [order, slot] : donors_) {
      if (!visit(Donor{slot, standings_[slot].spare})) return;
    }
  }
  // Sums over all slots.
  std::int64_t spare() const { return spare_; }
  std::int64_t draining() const { return draining_; }

 private:
  std::int64_t num_known() const { return static_cast<std::int64_t>(standings_.size()); }
  void LearnNext();

  const std::int64_t num_slots_;
  // Only the slots up to the last one that ever changed; those after it are idle and empty. So a pool of a million
  // slots is created quickly, and stays small if it uses few of them.
  std::vector<Standing> standings_;
  std::set<std::pair<std::int64_t, std::int32_t>> idle_;     // (fit, slot)
  std::set<std::pair<std::uint64_t, std::int32_t>> donors_;  // (order, slot)
  std::int64_t spare_ = 0;
  std::int64_t draining_ = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_CANDIDATES_H_
