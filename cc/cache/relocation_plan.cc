#include "cache/relocation_plan.h"

#include <algorithm>
#include <limits>
#include <set>
#include <unordered_map>
#include <utility>

namespace kvpage {
namespace {

// Eliminating a mapping is worth this many block copies.
constexpr std::int64_t kMostCopies = 32;
// Number of windows compared that keep some blocks of a chain in place: those that keep the most.
constexpr std::size_t kMostShifts = 8;
// Limit on the blocks examined in total: some tenths of a second.
constexpr std::int64_t kMostWork = std::int64_t{1} << 28;

class Planner {
 public:
  explicit Planner(const RelocationTask& task) : task_(task), uses_(task.uses), occupants_(task.uses.size()) {
    for (const RelocationTask::Chain& chain : task.chains) {
      const auto number = static_cast<std::int32_t>(places_.size());
      for (std::size_t i = 0; i < chain.blocks.size(); ++i) {
        occupants_[chain.blocks[i]] = {number, static_cast<std::int32_t>(i)};
      }
      places_.push_back(chain.blocks);
    }
    for (std::size_t block = 0; block < uses_.size(); ++block) {
      if (uses_[block] == BlockUse::kFree) free_.insert(static_cast<std::int32_t>(block));
    }
  }

  std::vector<PlannedMove> Run() {
    // Chains that are in order are not moved to make room for others.
    for (std::size_t chain = 0; chain < places_.size(); ++chain) {
      const std::vector<std::int32_t>& places = places_[chain];
      const auto count = static_cast<std::int64_t>(places.size());
      if (count > 1 && InOrder(static_cast<std::int32_t>(chain), 0, count)) Fix(places, 0, count);
    }
    for (std::size_t chain = 0; chain < places_.size() && !free_.empty(); ++chain) {
      Place(static_cast<std::int32_t>(chain), 0, static_cast<std::int64_t>(places_[chain].size()));
    }
    return std::move(moves_);
  }

 private:
  struct Item {
    std::int32_t chain = -1;  // -1: none
    std::int32_t index = 0;
  };
  // Cost of a window: the number of copies needed to fill it, or at least kMost if it cannot be filled.
  static constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max() / 4;
  struct Window {
    std::int64_t begin = -1;
    std::int64_t cost = kMost;
  };

  std::int64_t Left() const { return task_.most_moves - static_cast<std::int64_t>(moves_.size()); }
  std::int64_t num_blocks() const { return static_cast<std::int64_t>(uses_.size()); }
  // Number of copies needed to put something else into a block.
  std::int64_t Cost(std::int64_t block) const {
    if (uses_[block] == BlockUse::kFixed) return kMost;
    return uses_[block] == BlockUse::kFree ? 1 : 2;
  }

  // Places `count` blocks of a chain, from `begin` on, next to each other, or at least parts of them.
  void Place(std::int32_t chain, std::int64_t begin, std::int64_t count) {
    if (Left() <= 0 || count < 2) return;
    const std::vector<std::int32_t>& places = places_[chain];
    if (InOrder(chain, begin, count)) return Fix(places, begin, count);
    if (work_ > kMostWork) return;
    work_ += num_blocks();
    const std::int64_t align = task_.chains[chain].align;
    const Window window = FindWindow(chain, begin, count);
    if (window.cost <= Left() && (align > 1 || window.cost <= kMostCopies * Breaks(places, begin, count))) {
      return Fill(chain, begin, count, window.begin);
    }
    std::int64_t half = Break(places, begin, count);
    if (align > 1) {
      // Split only where an aligned part may begin, so that huge pages stay intact.
      half = (Phase(chain, begin) + count / 2 + align - 1) / align * align - Phase(chain, begin);
    }
    if (half <= 0 || half >= count) return;
    Place(chain, begin, half);
    Place(chain, begin + half, count - half);
  }

  static std::int64_t Breaks(const std::vector<std::int32_t>& places, std::int64_t begin, std::int64_t count) {
    std::int64_t breaks = 0;
    for (std::int64_t i = begin + 1; i < begin + count; ++i) breaks += places[i] != places[i - 1] + 1;
    return breaks;
  }

  bool InOrder(std::int32_t chain, std::int64_t begin, std::int64_t count) const {
    const std::vector<std::int32_t>& places = places_[chain];
    return (places[begin] - Phase(chain, begin)) % task_.chains[chain].align == 0 && Breaks(places, begin, count) == 0;
  }

  void Fix(const std::vector<std::int32_t>& places, std::int64_t begin, std::int64_t count) {
    for (std::int64_t i = begin; i < begin + count; ++i) uses_[places[i]] = BlockUse::kFixed;
  }

  // Number of blocks before the break that is closest to the middle; 0 if there is none.
  static std::int64_t Break(const std::vector<std::int32_t>& places, std::int64_t begin, std::int64_t count) {
    const auto at = [&](std::int64_t i) {
      return i > 0 && i < count && places[begin + i] != places[begin + i - 1] + 1;
    };
    for (std::int64_t off = 0; off <= count / 2; ++off) {
      if (at(count / 2 - off)) return count / 2 - off;
      if (at(count / 2 + off)) return count / 2 + off;
    }
    return 0;
  }

  // The start of a window for the chain's blocks from `begin` on, modulo its alignment.
  std::int64_t Phase(std::int32_t chain, std::int64_t begin) const {
    return (task_.chains[chain].phase + begin) % task_.chains[chain].align;
  }

  Window FindWindow(std::int32_t chain, std::int64_t begin, std::int64_t count) const {
    const std::vector<std::int32_t>& places = places_[chain];
    const std::int64_t align = task_.chains[chain].align, phase = Phase(chain, begin);
    Window best;
    const auto allowed = [&](std::int64_t start) {
      return start >= 0 && start + count <= num_blocks() && (start - phase) % align == 0;
    };
    // Windows in which some of the blocks are already in place.
    std::unordered_map<std::int64_t, std::int64_t> shifts;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t start = places[begin + i] - i;
      if (allowed(start)) ++shifts[start];
    }
    std::vector<std::pair<std::int64_t, std::int64_t>> kept;  // number of blocks that are not in place, start
    for (const auto& [start, blocks] : shifts) kept.emplace_back(count - blocks, start);
    const std::size_t compared = std::min(kept.size(), kMostShifts);
    std::partial_sort(kept.begin(), kept.begin() + compared, kept.end());
    for (std::size_t k = 0; k < compared; ++k) {
      const std::int64_t start = kept[k].second;
      std::int64_t cost = 0;
      for (std::int64_t i = 0; i < count && cost < kMost; ++i) {
        if (places[begin + i] != start + i) cost += Cost(start + i);
      }
      if (cost < best.cost) best = {start, cost};
    }
    // All other windows, with a sliding sum.
    std::int64_t sum = 0, blocked = 0;
    for (std::int64_t end = 0; end < num_blocks(); ++end) {
      const auto add = [&](std::int64_t block, std::int64_t sign) {
        const std::int64_t cost = Cost(block);
        (cost >= kMost ? blocked : sum) += sign * (cost >= kMost ? 1 : cost);
      };
      add(end, 1);
      if (end >= count) add(end - count, -1);
      const std::int64_t start = end + 1 - count;
      if (blocked == 0 && sum < best.cost && allowed(start)) best = {start, sum};
    }
    return best;
  }

  void Fill(std::int32_t chain, std::int64_t begin, std::int64_t count, std::int64_t start) {
    const std::vector<std::int32_t>& places = places_[chain];
    for (std::int64_t i = 0; i < count; ++i) {
      const auto target = static_cast<std::int32_t>(start + i);
      if (places[begin + i] != target) {
        if (uses_[target] != BlockUse::kFree) Move(target, SpareBlock(start, start + count));
        Move(places[begin + i], target);
      }
      uses_[target] = BlockUse::kFixed;
    }
  }

  // A free block, outside of the window if possible.
  std::int32_t SpareBlock(std::int64_t begin, std::int64_t end) const {
    if (*free_.rbegin() >= end) return *free_.rbegin();
    if (*free_.begin() < begin) return *free_.begin();
    return *free_.rbegin();
  }

  void Move(std::int32_t from, std::int32_t to) {
    const Item item = std::exchange(occupants_[from], {});
    occupants_[to] = item;
    places_[item.chain][item.index] = to;
    uses_[from] = BlockUse::kFree;
    uses_[to] = BlockUse::kMovable;
    free_.erase(to);
    free_.insert(from);
    moves_.push_back({from, to, item.chain, item.index});
  }

  const RelocationTask& task_;
  std::vector<std::vector<std::int32_t>> places_;  // places of the chains' blocks after the moves so far
  std::vector<BlockUse> uses_;   // [physical blocks] after the moves so far; also fixed: blocks in their final place
  std::vector<Item> occupants_;  // [physical blocks]
  std::set<std::int32_t> free_;
  std::int64_t work_ = 0;
  std::vector<PlannedMove> moves_;
};

}  // namespace

std::vector<PlannedMove> PlanRelocation(const RelocationTask& task) { return Planner(task).Run(); }

}  // namespace kvpage
