#include "cache/supply_plan.h"

#include <algorithm>

namespace kvpage {

std::int64_t SupplyPlan::blocks_moved() const {
  std::int64_t sum = 0;
  for (const BlockMove& move : moves) sum += move.blocks;
  return sum;
}

void PlanGrants(std::int64_t free, const std::vector<Donor>& donors, Source first, SupplyPlan* plan) {
  std::size_t next = 0;    // first donor that may have blocks left
  std::int64_t given = 0;  // by this donor
  for (Grant& grant : plan->grants) {
    std::int64_t missing = std::max<std::int64_t>(grant.wanted - grant.before, 0);
    const std::int64_t claimable = first == Source::kFree ? std::min(missing, free) : 0;
    while (missing > claimable && next < donors.size()) {
      const std::int64_t take = std::min(missing - claimable, donors[next].blocks - given);
      if (take > 0) plan->moves.push_back({donors[next].slot, grant.slot, take});
      missing -= take;
      given += take;
      if (given < donors[next].blocks) continue;
      ++next;
      given = 0;
    }
    grant.claimed = missing;
    grant.moves_end = plan->moves.size();
    free -= missing;
  }
}

void PlanReturns(std::int64_t blocks, const std::vector<Donor>& donors, SupplyPlan* plan) {
  for (const Donor& donor : donors) {
    if (blocks <= 0) break;
    const std::int64_t take = std::min(donor.blocks, blocks);
    if (take > 0) plan->returns.push_back({donor.slot, take});
    blocks -= take;
  }
}

}  // namespace kvpage
