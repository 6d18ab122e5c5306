// Candidates: the slots that a request may adopt and the slots that can give blocks, each in order.
//
// An index over the slot table and the arena, brought up to date with the slots that have changed (Supply::Refresh), so
// a claim costs by what has changed, not by the number of slots. It knows how many blocks a slot maps, not which: slots
// may share blocks, and what a slot with shared blocks can really give is the arena's answer (Arena::ExclusiveTail).
// Bookkeeping only, no locks: supply's mapping mutex guards it.
#ifndef KVPAGE_CACHE_CANDIDATES_H_
#define KVPAGE_CACHE_CANDIDATES_H_

#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "cache/supply_plan.h"

namespace kvpage {

// One slot as the index sees it.
struct Standing {
  bool idle = true;         // nobody has it and no view holds it: it may be adopted
  bool draining = false;    // its blocks come free by themselves
  std::int64_t blocks = 0;  // logical blocks mapped
  std::int64_t fit = 0;     // the same, as far as a new owner may have them; below 0: it must give them up first
  std::int64_t spare = 0;   // of these, the last ones that it does not need
  std::uint64_t order = 0;  // donors with smaller numbers give first, among equals lower slots
};

class Candidates {
 public:
  // Every slot is idle and without blocks.
  explicit Candidates(std::int64_t num_slots) : num_slots_(num_slots) {}

  void Update(std::int32_t slot, const Standing& now);
  Standing standing(std::int32_t slot) const { return slot < num_known() ? standings_[slot] : Standing(); }

  // One idle slot for each entry of `blocks` (the logical blocks of a request), chosen one after the other. Fewer when
  // there are not enough idle slots.
  // The smallest that suffices; failing that the largest; among equals the lowest. Slots that must give up what they
  // have come last.
  std::vector<std::int32_t> BestFits(const std::vector<std::int64_t>& blocks);

  // Idle slots with the fewest blocks; fewer than `count` when there are no more.
  std::vector<std::int32_t> FewestBlocks(std::size_t count);

  // Calls visit(donor) for the slots with spare blocks, in the order in which they give, until it returns false.
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
  // The first slots only, as far as one has ever changed: those behind are idle and without blocks. A pool of a million
  // slots is made at once, and one that uses few of them stays small.
  std::vector<Standing> standings_;
  std::set<std::pair<std::int64_t, std::int32_t>> idle_;     // (fit, slot)
  std::set<std::pair<std::uint64_t, std::int32_t>> donors_;  // (order, slot)
  std::int64_t spare_ = 0;
  std::int64_t draining_ = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_CANDIDATES_H_
