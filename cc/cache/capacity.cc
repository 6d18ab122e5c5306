#include "cache/capacity.h"

#include <algorithm>
#include <string>

namespace kvpage::capacity {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }

// Changes the budget; if it shrinks, parked blocks are given up.
Claim SetBudget(const PoolParts& pool, const MappingLock& mapping, std::int64_t budget) {
  Arena& arena = pool.supply->arena(mapping);
  Claim claim;
  if (arena.pool().num_used() > budget) pool.supply->Tally(mapping, {}, &claim);
  claim.wanted = arena.pool().num_used() - budget;  // free slots with shared blocks have given these up by now
  if (claim.wanted > 0) {
    if (claim.wanted > claim.reclaimable) {
      claim.status = ResourceExhausted(Number(claim.wanted) + " blocks must be freed, " + Number(claim.reclaimable) +
                                           " reclaimable, " + Number(claim.draining) + " draining",
                                       Reason::kOutOfBlocks);
      return claim;
    }
    claim.status = pool.supply->Reclaim(mapping, claim.wanted);
    if (!claim.status.ok()) return claim;
  }
  claim.status = arena.SetBudget(budget);
  return claim;
}

}  // namespace

Status Trim(const PoolParts& pool, std::int64_t* freed_blocks) {
  const MappingLock mapping = pool.supply->Lock();
  KVPAGE_RETURN_IF_ERROR(Enter(pool, pool.table->Lock(), "trim"));
  KVPAGE_RETURN_IF_ERROR(pool.supply->Apply(mapping, pool.supply->PlanTrim(mapping)));
  *freed_blocks = pool.supply->arena(mapping).Trim();
  return {};
}

Claim Resize(const PoolParts& pool, std::int64_t capacity_bytes) {
  const Geometry& geometry = pool.table->geometry();
  const MappingLock mapping = pool.supply->Lock();
  if (Status status = Enter(pool, pool.table->Lock(), "resize"); !status.ok()) return FailedClaim(status);
  const std::int64_t budget = capacity_bytes / geometry.block_bytes;
  if (budget < geometry.num_ranges()) {
    return FailedClaim(InvalidArgument("resize: capacity is " + Number(capacity_bytes) + " bytes, wanted at least " +
                                       Number(geometry.num_ranges()) + " blocks of " + Number(geometry.block_bytes)));
  }
  // Mappings are promised before the budget grows, and returned after it has shrunk.
  const std::int64_t before = pool.supply->arena(mapping).pool().budget();
  if (Status status = pool.supply->PromiseMappings(mapping, std::max(before, budget)); !status.ok()) {
    return FailedClaim(status.WithMessage("resize: " + status.message()));
  }
  Claim claim = SetBudget(pool, mapping, budget);
  static_cast<void>(pool.supply->PromiseMappings(mapping, claim.status.ok() ? budget : before));
  return claim;
}

}  // namespace kvpage::capacity
