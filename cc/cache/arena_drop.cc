// The part of Arena that drops blocks from the beginning of a slot.
#include <algorithm>

#include "cache/arena.h"

namespace kvpage {

// Needs no more memory mappings than were promised (WorstMappings): a range that begins with a hole needs another
// mapping only if the range before it is full, and a full range has no hole at its end.
Status Arena::DropBefore(std::int64_t slot, std::int64_t blocks) {
  const std::int64_t ranges = geometry_.num_ranges(), begin = hole(slot);
  const std::int64_t end = std::min(blocks, this->blocks(slot));
  if (end <= begin) return {};
  KVPAGE_RETURN_IF_ERROR(shared_runs_.Cut(slot, 0));
  const std::int64_t writable = std::clamp(ReadOnlyBlocks(slot), begin, end);
  const auto map_again = [&](std::int64_t range) -> Status {
    const std::vector<std::int32_t> lost = Gather(slot, range, begin, end - begin);
    if (begin < writable) {
      KVPAGE_RETURN_IF_ERROR(vmm_->MapReadOnly(geometry_.Offset(slot, range, begin), lost.data(), writable - begin));
    }
    if (writable == end) return {};
    return vmm_->Map(geometry_.Offset(slot, range, writable), lost.data() + (writable - begin), end - writable);
  };
  for (std::int64_t range = 0; range < ranges; ++range) {
    const std::vector<std::int32_t> dropped = Gather(slot, range, begin, end - begin);
    Status status = vmm_->Unmap(geometry_.Offset(slot, range, begin), dropped.data(), end - begin);
    if (status.ok()) continue;
    while (--range >= 0) {
      const Status rollback = map_again(range);
      if (!rollback.ok()) status = Internal(status.message() + "; mapping again failed too: " + rollback.message());
    }
    return status;
  }
  for (std::int64_t range = 0; range < ranges; ++range) {
    for (std::int64_t i = end; i-- > begin;) pool_.Release(maps_[slot][i * ranges + range]);
  }
  maps_.Drop(slot, end);
  holes_[slot] = end;
  changes_.Note(slot);
  const auto found = borrowers_.find(static_cast<std::int32_t>(slot));
  if (found == borrowers_.end() || found->second.read_only > end) return {};
  found->second.read_only = 0;
  if (found->second.set_aside.empty()) Forget(slot);
  return {};
}

}  // namespace kvpage
