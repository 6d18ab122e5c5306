// Which blocks change places so that logical neighbours become neighbours in the memory file, where the kernel merges
// their mappings.
//
// Numbers only: it works on a snapshot of the pool and may be out of date when it is carried out, so whoever does that
// checks each move again (relocation.h). A chain is a run of logical neighbours. Each one in turn gets a window of
// consecutive blocks: the one that takes the fewest copies. What else is in the window moves to free blocks first.
#ifndef KVPAGE_CACHE_RELOCATION_PLAN_H_
#define KVPAGE_CACHE_RELOCATION_PLAN_H_

#include <cstdint>
#include <vector>

namespace kvpage {

// What stands in a physical block. Fixed: used, and not to be moved.
enum class BlockUse : std::int8_t { kFree, kMovable, kFixed };

struct RelocationTask {
  // Consecutive logical blocks of one range, as the physical blocks that hold them. Each block is in at most one chain.
  struct Chain {
    std::vector<std::int32_t> blocks;
    // Where a window may begin: at block numbers that are `phase` modulo `align`.
    std::int32_t align = 1, phase = 0;
  };
  std::vector<BlockUse> uses;  // [physical blocks]
  std::vector<Chain> chains;   // the first ones matter most
  std::int64_t most_moves = 0;
};

struct PlannedMove {
  std::int32_t from = 0;  // where the contents are now
  std::int32_t to = 0;    // a block that is free once the moves before this one are made
  std::int32_t chain = 0;
  std::int32_t index = 0;  // which block of the chain it is
};

// In the order in which they are to be made. Movable blocks are those in chains.
std::vector<PlannedMove> PlanRelocation(const RelocationTask& task);

}  // namespace kvpage

#endif  // KVPAGE_CACHE_RELOCATION_PLAN_H_
