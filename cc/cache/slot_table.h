// SlotTable: the valid slot table. Who occupies each slot, how many tokens have room, are written, are done.
//
// Life of a slot:  free -> occupied (acquire) -> draining (release) -> free, once the release program has run and no
// handler and no view holds it. A free slot whose blocks are still mapped is parked. Data only: the pool's state mutex
// guards it, and what is mapped is the arena's business.
#ifndef KVPAGE_CACHE_SLOT_TABLE_H_
#define KVPAGE_CACHE_SLOT_TABLE_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/epoch.h"

namespace kvpage {

enum class SlotState : std::int8_t { kFree = 0, kOccupied = 1, kDraining = 2 };

struct Slot {
  SlotState state = SlotState::kFree;
  bool vacated = false;         // draining, and the release program has run
  std::int32_t pins = 0;        // handlers running on it
  std::int32_t views = 0;       // zero-copy arrays alive over it
  std::uint32_t since = 0;      // epoch of the last destructive change
  std::int32_t length = 0;      // as the last completed step left it
  std::int64_t reserved = 0;    // tokens asked for
  std::int64_t committed = 0;   // tokens whose ids the host has named
  std::uint64_t parked_at = 0;  // order of parking: the smallest was parked first
  // Per layer, tokens written by this occupant: nobody reads further, so recycled memory shows nobody else's data.
  std::vector<std::int32_t> written;

  bool idle() const { return state == SlotState::kFree && views == 0; }

  void Occupy(std::int64_t tokens) {
    state = SlotState::kOccupied;
    vacated = false;
    length = 0;
    reserved = tokens;
    committed = 0;
    std::fill(written.begin(), written.end(), 0);
  }
  std::int32_t WrittenInAllLayers() const { return *std::min_element(written.begin(), written.end()); }
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_SLOT_TABLE_H_
