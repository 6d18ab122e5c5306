// The part of Supply that frees what sliding windows have left behind: see dropping.h.
#include <algorithm>

#include "cache/supply.h"

namespace kvpage {

// Handlers that were checked after SlotProgress::dropped was raised do not access anything below it. Those that were
// checked before have the slot pinned, so the blocks are kept for them. Afterwards they are unmapped without the state
// mutex: the slot cannot get a new owner or a new generation meanwhile.
void Supply::FinishDrops(const MappingLock&) {
  const auto finished = [&](std::int32_t slot) {
    std::int64_t blocks = 0;
    {
      const StateLock state = table_->Lock();
      const SlotProgress& progress = table_->progress(state).slots[slot];
      blocks = progress.dropped / table_->geometry().block_tokens;
      if (arena_->hole(slot) >= std::min(blocks, arena_->blocks(slot))) return true;
      if (progress.pins > 0) return false;
    }
    return arena_->DropBefore(slot, blocks).ok();  // after a failure they stay mapped until the next attempt
  };
  drops_.erase(std::remove_if(drops_.begin(), drops_.end(), finished), drops_.end());
}

}  // namespace kvpage
