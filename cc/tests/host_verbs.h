// The host's part of acquire and release, as the tests call it.
#ifndef KVPAGE_TESTS_HOST_VERBS_H_
#define KVPAGE_TESTS_HOST_VERBS_H_

#include <cstdint>
#include <vector>

#include "cache/pool.h"

namespace kvpage::testing {

inline std::vector<SlotEdit> EditEach(SlotOpcode opcode, const std::vector<std::int32_t>& slots) {
  std::vector<SlotEdit> edits;
  for (const std::int32_t slot : slots) edits.push_back({static_cast<std::int32_t>(opcode), slot, 0});
  return edits;
}

inline Status StartRelease(Pool& pool, const std::vector<std::int32_t>& slots) {
  return pool.StartEdits("release", EditEach(SlotOpcode::kVacate, slots));
}
inline void UndoRelease(Pool& pool, const std::vector<std::int32_t>& slots) {
  pool.UndoEdits(EditEach(SlotOpcode::kVacate, slots));
}
inline void UndoAcquire(Pool& pool, const std::vector<std::int32_t>& slots) {
  pool.UndoEdits(EditEach(SlotOpcode::kOccupy, slots));
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_HOST_VERBS_H_
