// GhostTable: how often prefixes were requested whose entries have been evicted. The size is bounded: of eight prefixes
// that share a set, the oldest is forgotten. Prefixes are identified by hash alone, since a collision only affects an
// estimate.
#ifndef KVPAGE_CACHE_GHOST_TABLE_H_
#define KVPAGE_CACHE_GHOST_TABLE_H_

#include <cstdint>
#include <utility>
#include <vector>

namespace kvpage {

class GhostTable {
 public:
  struct Ghost {
    std::uint64_t hash = 0;
    std::uint32_t count = 0;  // 0: unused
    std::uint32_t age = 0;    // number of the Put that stored it
  };

  // Makes room for at least `prefixes` prefixes.
  void Reserve(std::size_t prefixes) {
    if (prefixes <= ghosts_.size()) return;
    std::size_t size = kWays;
    while (size < prefixes) size *= 2;
    std::vector<Ghost> old(size);
    old.swap(ghosts_);
    for (const Ghost& ghost : old) {
      if (ghost.count > 0) Place(ghost.hash) = ghost;
    }
  }
  void Put(std::uint64_t hash, std::uint32_t count) { Place(hash) = Ghost{hash, count, ++puts_}; }
  // Returns null if the prefix is not remembered.
  Ghost* Find(std::uint64_t hash) {
    if (ghosts_.empty()) return nullptr;
    Ghost* const set = Set(hash);
    for (std::size_t way = 0; way < kWays; ++way) {
      if (set[way].count > 0 && set[way].hash == hash) return &set[way];
    }
    return nullptr;
  }

 private:
  static constexpr std::size_t kWays = 8;

  Ghost* Set(std::uint64_t hash) { return &ghosts_[hash & (ghosts_.size() - kWays)]; }
  // Where the prefix is stored: its own place, an unused one, or that of the oldest prefix in the set.
  Ghost& Place(std::uint64_t hash) {
    if (Ghost* const known = Find(hash)) return *known;
    Ghost* const set = Set(hash);
    Ghost* oldest = set;
    for (std::size_t way = 0; way < kWays; ++way) {
      if (set[way].count == 0) return set[way];
      if (puts_ - set[way].age > puts_ - oldest->age) oldest = &set[way];
    }
    return *oldest;
  }

  std::vector<Ghost> ghosts_;  // sets of kWays; the number of sets is a power of two
  std::uint32_t puts_ = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_GHOST_TABLE_H_
