// Decides which blocks change places so that logical neighbours become neighbours in the memory file, where the kernel
// merges their mappings.
//
// Works on numbers only: a snapshot of the pool, which may be out of date when the plan is carried out, so each move
// must be checked again then (relocation.h). A chain is a run of logical neighbours. Each chain in turn gets a window
// of consecutive blocks: the one that needs the fewest copies. Other contents of the window are moved to free blocks
// first.
#ifndef KVPAGE_CACHE_RELOCATION_PLAN_H_
#define KVPAGE_CACHE_RELOCATION_PLAN_H_

#include <cstdint>
#include <vector>

namespace kvpage {

// The use of a physical block. kFixed: in use and must not be moved.
enum class BlockUse : std::int8_t { kFree, kMovable, kFixed };

struct RelocationTask {
  // Consecutive logical blocks of one range, as the physical blocks that hold them. Each block is in at most one chain.
  struct Chain {
    std::vector<std::int32_t> blocks;
    // Where a window may begin: at block numbers that are `phase` modulo `align`.
    std::int32_t align = 1, phase = 0;
  };
  std::vector<BlockUse> uses;  // [physical blocks]
  std::vector<Chain> chains;   // in order of priority
  std::int64_t most_moves = 0;
};

struct PlannedMove {
  std::int32_t from = 0;  // current place of the contents
  std::int32_t to = 0;    // a block that is free after the preceding moves
  std::int32_t chain = 0;
  std::int32_t index = 0;  // index of the block in the chain
};

// Returns the moves in the order in which they must be made. Movable blocks are those in chains.
std::vector<PlannedMove> PlanRelocation(const RelocationTask& task);

}  // namespace kvpage

#endif  // KVPAGE_CACHE_RELOCATION_PLAN_H_
