// SupplyPlan: who gives blocks to whom, as data. Planning looks at numbers only and maps nothing; supply.h applies the
// plan. A pool over several devices applies one plan to the arena of each.
#ifndef KVPAGE_CACHE_SUPPLY_PLAN_H_
#define KVPAGE_CACHE_SUPPLY_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvpage {

// All numbers of blocks here are logical blocks, per range of a slot.

// The minimum number of blocks that a slot should have.
struct Want {
  std::int32_t slot = 0;
  std::int64_t blocks = 0;
};

// A slot that can give blocks from its end.
struct Donor {
  std::int32_t slot = 0;
  std::int64_t blocks = 0;
};

// How one want is met: first by moves from donors, the rest by claiming free blocks.
struct Grant {
  std::int32_t slot = 0;
  std::int64_t wanted = 0;
  std::int64_t before = 0;    // blocks that the slot had, possibly more than it wants
  std::int64_t claimed = 0;   // taken from the free blocks
  std::size_t moves_end = 0;  // its moves are those from the end of the previous grant to here
};

struct BlockMove {
  std::int32_t from = 0;
  std::int32_t to = 0;
  std::int64_t blocks = 0;
};

struct SupplyPlan {
  std::vector<Grant> grants;     // in the order in which they are applied
  std::vector<BlockMove> moves;  // in the order of the grants
  std::vector<Donor> returns;    // blocks to be freed; applied first

  std::int64_t blocks_moved() const;
};

// Which source is used first. kFree: donors give only if there are not enough free blocks. kDonors: used if the system
// has less memory than the capacity promises; mapped blocks have theirs already.
enum class Source { kFree, kDonors };

// Sets grants[i].claimed and the moves; grants[i].slot, wanted and before must be set. `free`: number of free blocks,
// counted in logical blocks. `donors` give in their order.
void PlanGrants(std::int64_t free, const std::vector<Donor>& donors, Source first, SupplyPlan* plan);

// Plans for the donors to return at least `blocks`, or all they have.
void PlanReturns(std::int64_t blocks, const std::vector<Donor>& donors, SupplyPlan* plan);

}  // namespace kvpage

#endif  // KVPAGE_CACHE_SUPPLY_PLAN_H_
