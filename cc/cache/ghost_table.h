// GhostTable: how often prefixes were asked for whose entries have been evicted. Bounded: of eight prefixes that share
// a place, the oldest is forgotten. Prefixes are known by their hashes alone: a collision costs an estimate, no more.
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
    std::uint32_t age = 0;    // the number of the Put
  };

  // Makes room for `prefixes` prefixes or more.
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
  // Null when the prefix is not or no longer remembered.
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
  // Where the prefix goes: to its own place, an unused one, or that of the oldest.
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

  std::vector<Ghost> ghosts_;  // sets of kWays; a power of two
  std::uint32_t puts_ = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_GHOST_TABLE_H_
