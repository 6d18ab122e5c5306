#include "cache/relocation.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>

#include "cache/relocation_plan.h"

namespace kvpage::relocation {
namespace {

constexpr const char* kVerb = "relocate";
// Bytes copied each time the mapping mutex is held: a few tenths of a millisecond.
constexpr std::int64_t kPieceBytes = std::int64_t{1} << 20;
// Pause between two pieces. The mutex is not fair: a thread that takes it again at once would keep others from getting
// it.
constexpr std::chrono::microseconds kPause{50};

// Number of blocks in a huge page, or 0 and the reason.
std::int64_t BlocksInHugePage(const Geometry& geometry, std::int64_t huge, std::string* refused) {
  const auto number = [](std::int64_t value) { return std::to_string(value); };
  if (huge == 0) {
    *refused = "the system has no transparent huge pages, or had no address space to align slots to them";
  } else if (huge % geometry.block_bytes != 0) {
    *refused = "blocks of " + number(geometry.block_bytes) + " bytes do not divide a huge page of " + number(huge);
  } else if (geometry.range_bytes() % huge != 0) {
    *refused = "slots lie " + number(geometry.range_bytes()) + " bytes apart, not a multiple of a huge page of " +
               number(huge) + ": choose max_seq_len as a multiple of " +
               number(huge / geometry.block_bytes * geometry.block_tokens) + " tokens";
  } else {
    return huge / geometry.block_bytes;
  }
  return 0;
}

// Where a chain of the plan begins. All its blocks are in one range, and in the same slot or in none.
struct Origin {
  std::int32_t slot = -1;
  Arena::Place first;
  bool huge = false;  // has blocks that could fill a huge page
};

struct Snapshot {
  RelocationTask task;
  std::vector<Origin> origins;  // [chains]
};

class SnapshotMaker {
 public:
  SnapshotMaker(const PoolParts& pool, const MappingLock& mapping)
      : table_(*pool.table),
        arena_(pool.supply->arena(mapping)),
        index_(pool.supply->index(mapping)),
        ranges_(table_.geometry().num_ranges()),
        idle_(table_.num_slots()) {
    const StateLock state = table_.Lock();
    for (std::int64_t slot = 0; slot < table_.num_slots(); ++slot) idle_[slot] = table_.host(state, slot).idle();
  }

  // `huge`: number of blocks in a huge page, or 0 for none.
  Snapshot Make(const Options& options, std::int64_t huge) {
    CountMappers();
    std::vector<bool> named(idle_.size(), options.everything);
    for (const std::int32_t slot : options.slots) named[slot] = true;
    // Parked slots and cached prefixes first, then what occupied slots only read.
    for (std::size_t slot = 0; slot < idle_.size(); ++slot) {
      if (named[slot] && idle_[slot]) AddSlot(static_cast<std::int32_t>(slot), arena_.blocks(slot));
    }
    if (options.everything && index_ != nullptr) AddPrefixes();
    for (std::size_t slot = 0; slot < idle_.size(); ++slot) {
      if (named[slot] && !idle_[slot]) AddSlot(static_cast<std::int32_t>(slot), arena_.ReadOnlyBlocks(slot));
    }
    if (huge > 0) AlignShared(huge);
    return std::move(snapshot_);
  }

 private:
  const BlockPool& blocks() const { return arena_.pool(); }

  // Finds which blocks are free and which may move (Supply::MoveBlock).
  void CountMappers() {
    const auto num_blocks = static_cast<std::size_t>(blocks().num_blocks());
    std::vector<std::int32_t> mappers(num_blocks);
    movable_.assign(num_blocks, true);
    for (std::int64_t slot = 0; slot < table_.num_slots(); ++slot) {
      const std::int32_t* const map = arena_.map(slot);
      const std::int64_t read_only = arena_.ReadOnlyBlocks(slot);
      for (std::int64_t i = arena_.hole(slot) * ranges_; i < arena_.blocks(slot) * ranges_; ++i) {
        ++mappers[map[i]];
        if (!idle_[slot] && i / ranges_ >= read_only) movable_[map[i]] = false;
      }
    }
    std::vector<BlockUse>& uses = snapshot_.task.uses;
    uses.assign(num_blocks, BlockUse::kFixed);
    for (std::size_t i = 0; i < num_blocks; ++i) {
      const auto block = static_cast<std::int32_t>(i);
      if (blocks().free(block)) uses[i] = BlockUse::kFree;
      if (blocks().references(block) != mappers[i] || blocks().free(block)) movable_[i] = false;
    }
  }

  // Marks a block as part of a chain if it may move; returns whether it may.
  bool Take(std::int32_t block) {
    if (!movable_[block]) return false;
    movable_[block] = false;
    snapshot_.task.uses[block] = BlockUse::kMovable;
    return true;
  }

  std::vector<std::int32_t>& NewChain(const Origin& origin) {
    snapshot_.origins.push_back(origin);
    return snapshot_.task.chains.emplace_back().blocks;
  }

  // Adds the first `end` logical blocks of a slot.
  void AddSlot(std::int32_t slot, std::int64_t end) {
    for (std::int64_t range = 0; range < ranges_; ++range) {
      std::vector<std::int32_t>* chain = nullptr;
      for (std::int64_t logical = arena_.hole(slot); logical < end; ++logical) {
        const std::int32_t block = arena_.map(slot)[logical * ranges_ + range];
        if (!Take(block)) {
          chain = nullptr;
          continue;
        }
        if (chain == nullptr) chain = &NewChain({slot, {range, logical}});
        chain->push_back(block);
      }
    }
  }

  // Adds cached sequences that no slot maps. If there are several continuations, a chain follows the first.
  void AddPrefixes() {
    std::unordered_map<std::int32_t, std::size_t> ends;  // by last entry: the chain of the first range
    const auto visit = [&](std::int32_t, std::int32_t entry, std::int32_t parent, const std::int32_t*, std::int64_t) {
      const PrefixIndex::Place place = index_->PlaceOf(entry);
      const auto detached = [&](std::int32_t block) { return movable_[block] && blocks().references(block) == 0; };
      if (!std::all_of(place.blocks, place.blocks + ranges_, detached)) return;
      std::size_t first = snapshot_.origins.size();
      if (const auto before = ends.find(parent); before != ends.end()) {
        first = before->second;
        ends.erase(before);
      } else {
        for (std::int64_t range = 0; range < ranges_; ++range) NewChain({-1, {range, place.logical}});
      }
      ends.emplace(entry, first);
      for (std::int64_t range = 0; range < ranges_; ++range) {
        static_cast<void>(Take(place.blocks[range]));
        snapshot_.task.chains[first + range].blocks.push_back(place.blocks[range]);
      }
    };
    index_->ForEach(visit);
  }

  // Aligns chains that begin with shared or cached blocks and contain at least one full huge page of `huge` blocks.
  void AlignShared(std::int64_t huge) {
    for (std::size_t i = 0; i < snapshot_.origins.size(); ++i) {
      RelocationTask::Chain& chain = snapshot_.task.chains[i];
      const std::int64_t phase = snapshot_.origins[i].first.logical % huge;
      const std::int32_t block = chain.blocks[0];
      if (!blocks().cached(block) && blocks().references(block) < 2) continue;
      if ((huge - phase) % huge + huge > static_cast<std::int64_t>(chain.blocks.size())) continue;
      snapshot_.origins[i].huge = true;
      chain.align = static_cast<std::int32_t>(huge);
      chain.phase = static_cast<std::int32_t>(phase);
    }
  }

  const SlotTable& table_;
  const Arena& arena_;
  const PrefixIndex* const index_;
  const std::int64_t ranges_;
  std::vector<bool> idle_;     // [slots]
  std::vector<bool> movable_;  // [physical blocks] may move and is not in a chain yet
  Snapshot snapshot_;
};

Status CheckSlots(const SlotTable& table, const std::vector<std::int32_t>& slots) {
  for (const std::int32_t slot : slots) {
    if (slot >= 0 && slot < table.num_slots()) continue;
    return InvalidArgument("relocate: slot " + std::to_string(slot) + " does not exist: there are slots 0.." +
                           std::to_string(table.num_slots() - 1));
  }
  return {};
}

// Makes planned moves from *next on, up to the size of one piece. Skips those that are no longer possible.
Status MovePiece(const PoolParts& pool, Snapshot* snapshot, const std::vector<PlannedMove>& moves, std::size_t* next,
                 Report* report) {
  const MappingLock mapping = pool.supply->Lock();
  KVPAGE_RETURN_IF_ERROR(Enter(pool, pool.table->Lock(), kVerb));
  const std::int64_t block_bytes = pool.table->geometry().block_bytes;
  for (std::int64_t copied = 0; *next < moves.size() && copied < kPieceBytes; ++*next) {
    const PlannedMove& move = moves[*next];
    const Origin& origin = snapshot->origins[move.chain];
    const Arena::Place at{origin.first.range, origin.first.logical + move.index};
    bool moved = false;
    KVPAGE_RETURN_IF_ERROR(pool.supply->MoveBlock(mapping, origin.slot, at, move.from, move.to, &moved));
    if (!moved) continue;
    snapshot->task.chains[move.chain].blocks[move.index] = move.to;
    ++report->blocks_moved;
    report->bytes_copied += block_bytes;
    copied += block_bytes;
  }
  return {};
}

// Turns runs that are now in order into huge pages; stops at the first one that the system refuses.
Status Collapse(const PoolParts& pool, const Snapshot& snapshot, std::int64_t huge, Report* report) {
  for (std::size_t chain = 0; chain < snapshot.origins.size(); ++chain) {
    if (!snapshot.origins[chain].huge) continue;
    const std::vector<std::int32_t>& blocks = snapshot.task.chains[chain].blocks;
    const std::int64_t begin = (huge - snapshot.task.chains[chain].phase) % huge;
    for (std::int64_t i = begin; i + huge <= static_cast<std::int64_t>(blocks.size()); i += huge) {
      const std::int32_t first = blocks[i];
      const MappingLock mapping = pool.supply->Lock();
      KVPAGE_RETURN_IF_ERROR(Enter(pool, pool.table->Lock(), kVerb));
      Arena& arena = pool.supply->arena(mapping);
      bool whole = first % huge == 0;
      for (std::int64_t j = 0; whole && j < huge; ++j) {
        // A block that became free in the meantime may have no memory, and must not get any.
        whole = blocks[i + j] == first + j && !arena.pool().free(blocks[i + j]) &&
                arena.pool().backing(blocks[i + j]) == Backing::kOwn;
      }
      if (!whole) continue;
      if (const Status status = arena.Collapse(first, huge); !status.ok()) {
        report->huge_refused = status.message();
        return {};
      }
      ++report->huge_pages;
    }
  }
  if (report->huge_pages == 0) report->huge_refused = "no cached or shared blocks fill a huge page";
  return {};
}

}  // namespace

Status Relocate(const PoolParts& pool, const Options& options, Report* report) {
  SlotTable& table = *pool.table;
  if (pool.mirror != nullptr) {
    return {Code::kUnimplemented, "relocate: pool " + std::to_string(table.id()) +
                                      " lies in device memory, where every block is mapped by itself and no mappings "
                                      "merge: pools on CPU only"};
  }
  KVPAGE_RETURN_IF_ERROR(CheckSlots(table, options.slots));
  Snapshot snapshot;
  std::int64_t huge = 0;
  {
    const MappingLock mapping = pool.supply->Lock();
    KVPAGE_RETURN_IF_ERROR(Enter(pool, table.Lock(), kVerb));
    pool.supply->FinishChanges(mapping);
    pool.supply->SyncIndex(mapping);
    report->mappings_before = pool.supply->arena(mapping).CountMemoryMappings();
    const Arena& arena = pool.supply->arena(mapping);
    if (options.huge_pages) {
      huge = BlocksInHugePage(table.geometry(), arena.vmm().huge_page_bytes(), &report->huge_refused);
    }
    snapshot = SnapshotMaker(pool, mapping).Make(options, huge);
  }
  snapshot.task.most_moves = options.most_bytes / table.geometry().block_bytes;
  const std::vector<PlannedMove> moves = PlanRelocation(snapshot.task);
  for (std::size_t next = 0; next < moves.size();) {
    if (next > 0) std::this_thread::sleep_for(kPause);
    KVPAGE_RETURN_IF_ERROR(MovePiece(pool, &snapshot, moves, &next, report));
  }
  if (huge > 0) KVPAGE_RETURN_IF_ERROR(Collapse(pool, snapshot, huge, report));
  const MappingLock mapping = pool.supply->Lock();
  report->mappings_after = pool.supply->arena(mapping).CountMemoryMappings();
  return {};
}

}  // namespace kvpage::relocation
