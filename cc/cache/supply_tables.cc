// The part of Supply for handlers that address blocks by number (addressing="table"): a handler copies the rows of its
// sequences and finds the blocks in the block window.
//
// A row is copied once and may be older than the slot's mapping while the handler runs. This is safe because the slots
// are pinned. A handler uses the blocks of tokens that have room, and while its slot has an owner these are neither
// moved nor unmapped: plans take blocks beyond the room, or from free slots, and a pinned slot does not become free.
// Growing only appends. Only a truncation replaces blocks that others share, by copies with the same contents. The old
// block could then become free or be written by its last owner, and the handler would see that (unlike through the
// slot, whose mapping changes). So the slot keeps its reference as long as such handlers run.
#include <algorithm>
#include <string>

#include "cache/supply.h"

namespace kvpage {

Status Supply::OpenWindow() {
  if (arena_->window() != nullptr) return {};
  const MappingLock lock = Lock();
  return arena_->OpenWindow();
}

Status Supply::CopyTable(const StateLock&, std::int64_t layer, TableCall* call) const {
  const Geometry& geometry = table_->geometry();
  const std::int64_t ranges = geometry.table_ranges();
  std::int64_t width = 0;
  for (const Sequence& sequence : call->sequences) width = std::max(width, geometry.BlocksFor(sequence.end()));
  call->blocks.resize(call->sequences.size() * ranges * width);
  std::int32_t* row = call->blocks.data();
  std::int32_t number = 0;
  for (Sequence& sequence : call->sequences) {
    const std::int64_t blocks = geometry.BlocksFor(sequence.end());
    for (std::int64_t kind = 0; kind < ranges; ++kind, row += width) {
      if (arena_->block_table().Copy(sequence.slot, geometry.TableRange(layer, kind), blocks, row)) continue;
      return Internal("slot " + std::to_string(sequence.slot) + " has fewer than the " + std::to_string(blocks) +
                      " blocks that it has room for");
    }
    sequence.slot = number++;
  }
  call->view = geometry.TableView(arena_->window());
  call->view.table = call->blocks.data();
  call->view.table_width = ranges * width;
  call->view.table_kv_stride = ranges > 1 ? width : 0;
  return {};
}

void Supply::ReleaseHeld(const MappingLock&) {
  if (arena_->held().empty()) return;
  std::vector<bool> unused(table_->num_slots());
  {
    const StateLock state = table_->Lock();
    const std::vector<SlotProgress>& slots = table_->progress(state).slots;
    for (std::size_t slot = 0; slot < unused.size(); ++slot) unused[slot] = slots[slot].by_block == 0;
  }
  arena_->ReleaseHeld(unused);
}

}  // namespace kvpage
