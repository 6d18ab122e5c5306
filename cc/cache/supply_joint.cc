// The part of Supply for decisions about several pools at once (joint_supply.h).
#include <limits>
#include <utility>

#include "cache/supply.h"

namespace kvpage {

std::vector<Donor> Supply::AllDonors(const MappingLock& lock, const Want& want) {
  Refresh(lock);
  return FindDonors({want}, Spare::kExclusive, std::numeric_limits<std::int64_t>::max());
}

std::vector<std::int32_t> Supply::BlocksOf(const MappingLock&, const EvictionPlan& plan) const {
  std::vector<std::int32_t> blocks;
  blocks.reserve(plan.entries.size());
  for (const PrefixIndex::Eviction& eviction : plan.entries) {
    blocks.push_back(index_->PlaceOf(static_cast<std::int32_t>(eviction.entry)).blocks[0]);
  }
  return blocks;
}

}  // namespace kvpage
