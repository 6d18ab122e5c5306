// Looking at a pool: numbers, the valid slot table, block maps, zero-copy views.
#include <string>
#include <utility>

#include "cache/pool.h"

namespace kvpage {

PoolNumbers Pool::Numbers() {
  const std::lock_guard<std::mutex> mapping(mapping_mutex_);
  const std::lock_guard<std::mutex> state(state_mutex_);
  TakeInReleases();
  const BlockPool& blocks = arena_->pool();
  PoolNumbers n;
  n.blocks_total = blocks.budget();
  n.blocks_free = blocks.num_free();
  n.blocks_shared = blocks.num_shared();
  n.blocks_peak = blocks.peak_used();
  n.blocks_warm = blocks.num_warm();
  for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) {
    const std::int64_t mapped = arena_->physical_blocks(slot);
    switch (slots_[slot].state) {
      case SlotState::kOccupied:
        n.blocks_mapped += mapped;
        ++n.slots_occupied;
        break;
      case SlotState::kDraining:
        n.blocks_draining += mapped;
        ++n.slots_draining;
        break;
      case SlotState::kFree:
        n.blocks_parked += mapped;
        n.slots_parked += mapped > 0;
        break;
    }
  }
  n.block_bytes = geometry_.block_bytes;
  n.virtual_bytes = geometry_.virtual_bytes();
  n.physical_bytes = arena_->vmm().PhysicalBytes();
  n.system_calls = arena_->vmm().system_calls();
  n.waits = waits_ + (mirror_ != nullptr ? mirror_->waits() : 0);
  return n;
}

std::vector<SlotRow> Pool::Rows() {
  const std::lock_guard<std::mutex> mapping(mapping_mutex_);
  const std::lock_guard<std::mutex> state(state_mutex_);
  TakeInReleases();
  std::vector<SlotRow> rows;
  for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) {
    const Slot& row = slots_[slot];
    if (row.state == SlotState::kFree) continue;
    rows.push_back({static_cast<std::int32_t>(slot), row.state, arena_->physical_blocks(slot), row.reserved,
                    static_cast<std::int64_t>(row.committed.size()), row.length});
  }
  return rows;
}

Status Pool::BlockMap(std::int32_t slot, std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>>* out) {
  const std::lock_guard<std::mutex> mapping(mapping_mutex_);
  {
    const std::lock_guard<std::mutex> state(state_mutex_);
    KVPAGE_RETURN_IF_ERROR(CheckOpen("block_map"));
    KVPAGE_RETURN_IF_ERROR(CheckOccupied("block_map", slot));
  }
  out->assign(geometry_.num_ranges(), {});
  for (std::int64_t range = 0; range < geometry_.num_ranges(); ++range) {
    for (std::int32_t block : arena_->block_map(slot, range)) {
      (*out)[range].emplace_back(block, arena_->pool().references(block));
    }
  }
  return {};
}

Status Pool::AddView(std::int64_t layer, std::int32_t slot) {
  const std::lock_guard<std::mutex> mapping(mapping_mutex_);
  std::unique_lock<std::mutex> state(state_mutex_);
  KVPAGE_RETURN_IF_ERROR(CheckOpen("view"));
  if (mirror_ != nullptr) {
    return InvalidArgument(
        "view: pool " + std::to_string(id_) +
        " lies in device memory, where the part of a slot that is not mapped cannot be read, so no array may stand for "
        "it: read the cache with paged_attention, or use a pool on a CPU device for views");
  }
  if (layer < 0 || layer >= geometry_.num_layers) {
    return OutOfRange("view: layer is " + std::to_string(layer) + ", wanted 0.." +
                      std::to_string(geometry_.num_layers - 1));
  }
  if (slot >= 0) {
    KVPAGE_RETURN_IF_ERROR(CheckOccupied("view", slot));
  } else if (slot != -1) {
    return InvalidArgument("view: slot " + std::to_string(slot) + " does not exist");
  }
  const std::int64_t begin = slot >= 0 ? slot : 0;
  const std::int64_t end = slot >= 0 ? slot + 1 : geometry_.max_slots;
  // Recycled memory beyond what its occupant has written is zeroed once; whatever is mapped from now on while the view
  // lives is zeroed as it comes (Blank). No handler may be writing meanwhile, hence the wait and the lock held.
  const auto busy = [&] {
    for (std::int64_t s = begin; s < end; ++s) {
      if (slots_[s].pins > 0) return true;
    }
    return false;
  };
  if (busy()) ++waits_;
  changed_.wait(state, [&] { return !busy() || closed_; });
  KVPAGE_RETURN_IF_ERROR(CheckOpen("view"));
  for (std::int64_t s = begin; s < end; ++s) {
    const bool owned = slots_[s].state != SlotState::kFree;
    arena_->ZeroTail(s, layer, owned ? slots_[s].written[layer] : 0);
  }
  ++(slot >= 0 ? slots_[slot].views : arena_views_);
  return {};
}

void Pool::RemoveView(std::int32_t slot) {
  if (!CheckProcess("view").ok()) return;
  const std::lock_guard<std::mutex> state(state_mutex_);
  if (slot < 0) {
    --arena_views_;
    return;
  }
  --slots_[slot].views;
  FinishDraining(slot);
}

}  // namespace kvpage
