// JointSupply: provides blocks for a slot of several pools that act as one, with a pool for each device of a mesh. All
// arenas map the same block numbers, or none maps anything.
//
// The pools' programs run at different times, so one pool may have more free blocks and more parked slots than another:
// only what all of them can give is taken. So the blocks of a released slot are available once it has drained in all
// pools.
#ifndef KVPAGE_CACHE_JOINT_SUPPLY_H_
#define KVPAGE_CACHE_JOINT_SUPPLY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_set>
#include <vector>

#include "cache/parts.h"

namespace kvpage {

class JointSupply {
 public:
  // Takes the mapping mutexes of all pools, in order, and holds them until destroyed. The pools have the same geometry
  // and outlive this object; either all of them have a mirror or none has.
  explicit JointSupply(const std::vector<const PoolParts*>& pools);
  JointSupply(const JointSupply&) = delete;
  JointSupply& operator=(const JointSupply&) = delete;

  const MappingLock& lock(std::size_t pool) const { return *locks_[pool]; }
  // Maps at least `want.blocks` in every arena and publishes the room to the mirrors. Returns kResourceExhausted if any
  // of them lacks the memory. After any error nothing is mapped in any arena.
  Status Reserve(const Want& want);
  // Makes all pools hand out their free blocks in the same order again, after a Reserve that failed.
  void Align();
  bool failed() const { return failed_; }

 private:
  Arena& arena(std::size_t pool) const { return pools_[pool]->supply->arena(lock(pool)); }
  // Logical blocks that are free in every arena.
  std::int64_t Free() const;
  // Slots that can give blocks in every arena, and how many, in the order of the first pool.
  std::vector<Donor> Donors(const Want& want) const;
  // Makes every prefix index drop the same entries until at least `blocks` physical blocks come free, or none.
  bool Evict(std::int64_t blocks) const;
  bool Evict(std::int64_t blocks, const std::unordered_set<std::int32_t>* allowed) const;
  // The blocks for the plan's grant, which are free in every arena; fewer if there are not enough.
  std::vector<std::int32_t> Choose(const SupplyPlan& plan) const;
  Status Apply(const SupplyPlan& plan);
  // Publishes a plan that was applied in all pools to their mirrors; if one fails, undoes the plan in all pools.
  Status Publish(const SupplyPlan& plan);
  // Undoes a plan in a pool whose mirror has already published it.
  void Withdraw(std::size_t pool, const SupplyPlan& plan);

  const std::vector<const PoolParts*>& pools_;
  std::vector<std::unique_ptr<MappingLock>> locks_;
  bool failed_ = false;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_JOINT_SUPPLY_H_
