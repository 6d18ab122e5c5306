#include "cache/joint_supply.h"

#include <algorithm>
#include <limits>
#include <string>
#include <unordered_map>
#include <utility>

namespace kvpage {
namespace {

constexpr std::int64_t kAll = std::numeric_limits<std::int64_t>::max();

std::int64_t CountBlocks(const std::vector<Donor>& donors) {
  std::int64_t sum = 0;
  for (const Donor& donor : donors) sum += donor.blocks;
  return sum;
}

Status TooFew(std::int64_t wanted, std::int64_t free) {
  return ResourceExhausted(std::to_string(wanted) + " blocks wanted, " + std::to_string(free) + " free on all devices",
                           Reason::kOutOfBlocks);
}

}  // namespace

JointSupply::JointSupply(const std::vector<const PoolParts*>& pools) : pools_(pools) {
  for (const PoolParts* pool : pools_) locks_.emplace_back(new MappingLock(pool->supply->Lock()));
}

std::int64_t JointSupply::Free() const {
  std::int64_t free = kAll;
  for (std::size_t i = 0; i < pools_.size(); ++i) free = std::min(free, arena(i).pool().num_free());
  return free / pools_[0]->table->geometry().num_ranges();
}

std::vector<Donor> JointSupply::Donors(const Want& want) const {
  std::vector<Donor> donors = pools_[0]->supply->AllDonors(lock(0), want);
  for (std::size_t i = 1; i < pools_.size(); ++i) {
    std::unordered_map<std::int32_t, std::int64_t> here;
    for (const Donor& donor : pools_[i]->supply->AllDonors(lock(i), want)) here.emplace(donor.slot, donor.blocks);
    for (Donor& donor : donors) {
      const auto found = here.find(donor.slot);
      donor.blocks = found == here.end() ? 0 : std::min(donor.blocks, found->second);
      // Tails of different lengths end in different blocks.
      if (arena(i).blocks(donor.slot) != arena(0).blocks(donor.slot)) donor.blocks = 0;
    }
  }
  donors.erase(std::remove_if(donors.begin(), donors.end(), [](const Donor& donor) { return donor.blocks == 0; }),
               donors.end());
  return donors;
}

bool JointSupply::Evict(std::int64_t blocks, const std::unordered_set<std::int32_t>* allowed) const {
  std::vector<Supply::EvictionPlan> plans;
  plans.push_back(pools_[0]->supply->PlanEvictionOf(lock(0), blocks, allowed));
  if (plans[0].freed < blocks) return false;
  const std::vector<std::int32_t> first = pools_[0]->supply->BlocksOf(lock(0), plans[0]);
  const std::unordered_set<std::int32_t> chosen(first.begin(), first.end());
  for (std::size_t i = 1; i < pools_.size(); ++i) {
    plans.push_back(pools_[i]->supply->PlanEvictionOf(lock(i), plans[0].freed, &chosen));
    if (plans[i].freed != plans[0].freed || plans[i].entries.size() != plans[0].entries.size()) return false;
  }
  for (std::size_t i = 0; i < pools_.size(); ++i) pools_[i]->supply->ApplyEviction(lock(i), plans[i]);
  return true;
}

bool JointSupply::Evict(std::int64_t blocks) const {
  // Evict what the first pool would evict, if the others can do the same. Otherwise it chooses from what all can evict.
  if (Evict(blocks, nullptr)) return true;
  std::unordered_map<std::int32_t, std::size_t> counts;
  for (std::size_t i = 0; i < pools_.size(); ++i) {
    Supply& supply = *pools_[i]->supply;
    for (const std::int32_t block : supply.BlocksOf(lock(i), supply.PlanEvictionOf(lock(i), kAll, nullptr))) {
      ++counts[block];
    }
  }
  std::unordered_set<std::int32_t> everywhere;
  for (const auto& [block, count] : counts) {
    if (count == pools_.size()) everywhere.insert(block);
  }
  return Evict(blocks, &everywhere);
}

std::vector<std::int32_t> JointSupply::Choose(const SupplyPlan& plan) const {
  const Grant& grant = plan.grants[0];
  const std::int64_t ranges = pools_[0]->table->geometry().num_ranges();
  std::vector<std::int32_t> blocks;
  std::unordered_set<std::int32_t> taken;
  const auto usable = [&](std::int32_t block) {
    for (std::size_t i = 0; i < pools_.size(); ++i) {
      if (block >= arena(i).pool().num_blocks() || !arena(i).pool().free(block)) return false;
    }
    return taken.count(block) == 0;
  };
  const BlockPool& pool = arena(0).pool();
  std::int32_t next = pool.FirstFree();
  for (std::int64_t i = 0; i < grant.claimed * ranges; ++i) {
    // Prefer the block that follows the previous one, as BlockPool::Claim does.
    std::int32_t block = blocks.empty() ? -1 : blocks.back() + 1;
    if (i % grant.claimed == 0 && grant.before > 0) {
      block = arena(0).map(grant.slot)[(grant.before - 1) * ranges + i / grant.claimed] + 1;
    }
    const bool cheap = block > 0 && block < pool.num_blocks() && (pool.warm(block) || pool.num_warm() == 0);
    if (!cheap || !usable(block)) {
      while (next >= 0 && !usable(next)) next = pool.NextFree(next);
      block = next;
    }
    if (block < 0) break;
    blocks.push_back(block);
    taken.insert(block);
  }
  return blocks;
}

Status JointSupply::Apply(const SupplyPlan& plan) {
  const std::vector<std::int32_t> blocks = Choose(plan);
  for (std::size_t i = 0; i < pools_.size(); ++i) {
    arena(i).Prefer(blocks);
    Status status = pools_[i]->supply->Apply(lock(i), plan);
    arena(i).Prefer({});
    if (status.ok()) continue;
    failed_ = true;
    while (i-- > 0) pools_[i]->supply->Undo(lock(i), plan);
    return status;
  }
  return Publish(plan);
}

Status JointSupply::Publish(const SupplyPlan& plan) {
  for (std::size_t i = 0; i < pools_.size(); ++i) {
    Status status = PublishRoom(*pools_[i], lock(i), plan);  // on failure it undoes the plan in this pool
    if (status.ok()) continue;
    failed_ = true;
    for (std::size_t later = i + 1; later < pools_.size(); ++later) pools_[later]->supply->Undo(lock(later), plan);
    while (i-- > 0) Withdraw(i, plan);
    return status;
  }
  return {};
}

void JointSupply::Withdraw(std::size_t i, const SupplyPlan& plan) {
  const PoolParts& pool = *pools_[i];
  std::vector<std::int32_t> slots;
  std::vector<Mirror::Room> rooms;
  {
    const StateLock state = pool.table->Lock();
    for (const Grant& grant : plan.grants) {
      slots.push_back(grant.slot);
      rooms.push_back({grant.slot, static_cast<std::int32_t>(pool.table->Room(state, grant.slot))});
      pool.table->progress(state).slots[grant.slot].by_block = 1;  // until the mirror has the old blocks again
    }
  }
  // A program there may have read the new room and write to it. If it cannot be stopped, the blocks stay mapped, and
  // the slot has more blocks than in the other pools until the host's next extend evens this out.
  if (!pool.mirror->StopReaders(rooms).ok()) return;
  pool.supply->Undo(lock(i), plan);
  static_cast<void>(PublishSlots(pool, lock(i), slots, /*stopped=*/true));
}

Status JointSupply::Reserve(const Want& want) {
  const std::int64_t ranges = pools_[0]->table->geometry().num_ranges();
  const std::int64_t before = arena(0).blocks(want.slot);
  for (std::size_t i = 1; i < pools_.size(); ++i) {
    // A host call is in progress and has reached some of the pools.
    if (arena(i).blocks(want.slot) != before) return TooFew(want.blocks - before, 0);
  }
  const std::int64_t missing = want.blocks - before;
  SupplyPlan plan;
  plan.grants.push_back({want.slot, want.blocks, before});
  if (missing <= 0) return Publish(plan);  // the mirrors may not have these blocks as room yet
  std::int64_t free = Free();
  std::vector<Donor> donors;
  if (missing > free) {
    donors = Donors(want);
    free = Free();  // slots without an owner may have given up what they shared
    if (const std::int64_t short_of = missing - free - CountBlocks(donors); short_of > 0) {
      if (Evict(short_of * ranges)) {
        donors = Donors(want);
        free = Free();
      }
      if (missing > free + CountBlocks(donors)) return TooFew(missing * ranges, free * ranges);
    }
  }
  PlanGrants(free, donors, Source::kFree, &plan);
  Status status = Apply(plan);
  if (status.code() != Code::kResourceExhausted) return status;
  // The system has less memory than the capacity promises. Blocks that are mapped already have theirs.
  SupplyPlan moving;
  moving.grants.push_back({want.slot, want.blocks, before});
  PlanGrants(Free(), Donors(want), Source::kDonors, &moving);
  return moving.blocks_moved() > plan.blocks_moved() ? Apply(moving) : status;
}

void JointSupply::Align() {
  for (std::size_t i = 0; i < pools_.size(); ++i) arena(i).Align();
  failed_ = false;
}

}  // namespace kvpage
