#include "cache/arena.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <utility>

namespace kvpage {

Arena::Arena(const Geometry& geometry, std::int64_t budget_blocks, std::unique_ptr<Vmm> vmm)
    : geometry_(geometry),
      pool_(budget_blocks),
      vmm_(std::move(vmm)),
      maps_(geometry.max_slots, geometry.num_ranges()),
      holes_(geometry.max_slots, 0),
      changes_(geometry.max_slots),
      shared_runs_(geometry.max_slots, geometry.block_tokens) {
  pool_.OnReturned([this](std::int32_t block) { vmm_->Return(block); });
}

Status Arena::Make(const Geometry& geometry, std::int64_t budget_blocks, std::unique_ptr<Vmm> vmm,
                   std::unique_ptr<Arena>* out) {
  KVPAGE_RETURN_IF_ERROR(vmm->Grow(budget_blocks));
  out->reset(new Arena(geometry, budget_blocks, std::move(vmm)));
  return {};
}

std::vector<std::int32_t> Arena::Gather(std::int64_t slot, std::int64_t range, std::int64_t begin,
                                        std::int64_t count) const {
  const std::int64_t ranges = geometry_.num_ranges();
  std::vector<std::int32_t> blocks(count);
  for (std::int64_t i = 0; i < count; ++i) blocks[i] = maps_[slot][(begin + i) * ranges + range];
  return blocks;
}

void Arena::Append(std::int64_t slot, const std::vector<std::int32_t>& blocks) {
  const std::int64_t old = this->blocks(slot);
  maps_.Append(slot, blocks);
  NoteWriter(slot, old);
  changes_.Note(slot);
}

void Arena::Truncate(std::int64_t slot, std::int64_t blocks) {
  maps_.Truncate(slot, blocks);
  holes_[slot] = std::min(holes_[slot], blocks);
  changes_.Note(slot);
}

std::int64_t Arena::ExclusiveTail(std::int64_t slot, std::int64_t most) const {
  const std::int64_t ranges = geometry_.num_ranges(), last = blocks(slot) - 1;
  most = std::min(most, last + 1 - std::max(ReadOnlyBlocks(slot), hole(slot)));
  if (pool_.num_shared() == 0 && pool_.num_cached() == 0) return most;
  const auto exclusive = [&](std::int64_t logical) {
    const std::int32_t* const begin = &maps_[slot][logical * ranges];
    return std::all_of(begin, begin + ranges,
                       [&](std::int32_t block) { return pool_.references(block) == 1 && !pool_.cached(block); });
  };
  std::int64_t run = 0;
  while (run < most && exclusive(last - run)) ++run;
  return run;
}

std::int64_t Arena::FreedBy(const std::vector<std::int32_t>& slots) const {
  std::int64_t freed = 0;
  std::unordered_map<std::int32_t, std::int32_t> dropped;  // references dropped, for shared blocks
  for (const std::int32_t slot : slots) {
    if (pool_.num_shared() == 0 && pool_.num_cached() == 0) {
      freed += mappings(slot);
      continue;
    }
    for (const std::int32_t block : maps_[slot]) {
      if (block < 0 || pool_.cached(block)) continue;
      const std::int32_t references = pool_.references(block);
      freed += references == 1 || ++dropped[block] == references;
    }
  }
  return freed;
}

std::vector<std::int64_t> Arena::CountByClass(const std::vector<std::int8_t>& classes, int num_classes,
                                              const std::vector<Classed>& others) const {
  std::vector<std::int64_t> counts(num_classes, 0);
  if (pool_.num_shared() == 0 && held_.empty() && others.empty()) {
    for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) counts[classes[slot]] += mappings(slot);
    return counts;
  }
  std::vector<std::int8_t> lowest(pool_.num_blocks(), static_cast<std::int8_t>(num_classes));
  for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) {
    for (const std::int32_t block : maps_[slot]) {
      if (block >= 0) lowest[block] = std::min(lowest[block], classes[slot]);
    }
  }
  for (const Held& held : held_) lowest[held.block] = std::min(lowest[held.block], classes[held.slot]);
  for (const auto& [block, number] : others) lowest[block] = std::min(lowest[block], number);
  for (const std::int8_t number : lowest) {
    if (number < num_classes) ++counts[number];
  }
  return counts;
}

Status Arena::Grow(std::int64_t slot, std::int64_t blocks) {
  const std::int64_t ranges = geometry_.num_ranges();
  const std::int64_t old = this->blocks(slot);
  const std::int64_t more = blocks - old;
  if (more <= 0) return {};
  if (HasFile(slot)) return GrowInFile(slot, blocks);
  std::vector<std::int32_t> claimed;
  std::vector<std::int32_t> cold;
  claimed.reserve(more * ranges);
  for (std::int64_t range = 0; range < ranges; ++range) {
    const std::int32_t after = old > 0           ? maps_[slot][(old - 1) * ranges + range]
                               : claimed.empty() ? -1
                                                 : claimed.back();
    if (!pool_.Claim(more, after, &claimed, &cold)) {
      pool_.Unclaim(claimed, cold);
      return ResourceExhausted(
          std::to_string(more * ranges) + " blocks wanted, " + std::to_string(pool_.num_free()) + " free",
          Reason::kOutOfBlocks);
    }
  }
  std::vector<std::int32_t> in_order = cold;
  std::sort(in_order.begin(), in_order.end());
  if (Status status = vmm_->Create(in_order.data(), static_cast<std::int64_t>(in_order.size())); !status.ok()) {
    pool_.Unclaim(claimed, cold);
    return status;
  }
  for (std::int64_t range = 0; range < ranges; ++range) {
    Status status = vmm_->Map(geometry_.Offset(slot, range, old), &claimed[range * more], more);
    if (status.ok()) continue;
    for (std::int64_t mapped = 0; mapped < range; ++mapped) {
      static_cast<void>(vmm_->Unmap(geometry_.Offset(slot, mapped, old), &claimed[mapped * more], more));
    }
    pool_.Unclaim(claimed, {});  // they have been created and stay warm
    return status;
  }
  Append(slot, claimed);
  pool_.NotePeak();
  return {};
}

Status Arena::Adopt(std::int64_t slot, const std::int32_t* map, std::int64_t count) {
  const std::int64_t ranges = geometry_.num_ranges(), old = blocks(slot);
  if (count <= 0) return {};
  std::vector<std::int32_t> adopted(static_cast<std::size_t>(count * ranges));  // [ranges, blocks]
  for (std::int64_t i = 0; i < count * ranges; ++i) adopted[i % ranges * count + i / ranges] = map[i];
  for (std::int64_t range = 0; range < ranges; ++range) {
    Status status = vmm_->Map(geometry_.Offset(slot, range, old), &adopted[range * count], count);
    if (status.ok()) continue;
    while (--range >= 0) {
      static_cast<void>(vmm_->Unmap(geometry_.Offset(slot, range, old), &adopted[range * count], count));
    }
    return status;
  }
  for (const std::int32_t block : adopted) pool_.AddReference(block);
  Append(slot, adopted);
  return {};
}

Status Arena::Shrink(std::int64_t slot, std::int64_t blocks) {
  const std::int64_t ranges = geometry_.num_ranges();
  const std::int64_t fewer = this->blocks(slot) - blocks;
  if (fewer <= 0) return {};
  const std::int64_t begin = std::max(blocks, hole(slot)), count = blocks + fewer - begin;
  const auto tail = [&](std::int64_t range) { return Gather(slot, range, begin, count); };
  KVPAGE_RETURN_IF_ERROR(shared_runs_.Cut(slot, blocks));
  for (std::int64_t range = 0; count > 0 && range < ranges; ++range) {
    Status status = vmm_->Unmap(geometry_.Offset(slot, range, begin), tail(range).data(), count);
    if (status.ok()) continue;
    for (std::int64_t r = 0; r < range; ++r) {
      const Status rollback = vmm_->Map(geometry_.Offset(slot, r, begin), tail(r).data(), count);
      if (!rollback.ok()) status = Internal(status.message() + "; mapping again failed too: " + rollback.message());
    }
    return status;
  }
  for (std::int64_t range = 0; range < ranges; ++range) {
    // In reverse order, so that the free list hands them out again in their old order.
    for (std::int64_t i = begin + count - 1; i >= begin; --i) pool_.Release(maps_[slot][i * ranges + range]);
  }
  Truncate(slot, blocks);
  ForgetBeyond(slot, blocks);
  return {};
}

Status Arena::Move(std::int64_t from, std::int64_t to, std::int64_t blocks) {
  if (blocks <= 0) return {};
  const std::int64_t ranges = geometry_.num_ranges();
  const std::int64_t rest = this->blocks(from) - blocks, old = this->blocks(to);
  KVPAGE_RETURN_IF_ERROR(shared_runs_.Cut(from, rest));
  if (HasFile(from) || HasFile(to)) {  // the memory belongs to another file, and its contents are not needed
    KVPAGE_RETURN_IF_ERROR(Shrink(from, rest));
    Status status = Grow(to, old + blocks);
    if (!status.ok()) static_cast<void>(Grow(from, rest + blocks));
    return status;
  }
  const auto move = [&](std::int64_t range, bool back) {
    const std::int64_t here = geometry_.Offset(from, range, rest), there = geometry_.Offset(to, range, old);
    const std::vector<std::int32_t> moved = Gather(from, range, rest, blocks);
    return vmm_->Move(back ? there : here, back ? here : there, moved.data(), blocks);
  };
  for (std::int64_t range = 0; range < ranges; ++range) {
    Status status = move(range, /*back=*/false);
    if (status.ok()) continue;
    while (--range >= 0) static_cast<void>(move(range, /*back=*/true));
    return status;
  }
  maps_.AppendFrom(to, from, rest);
  NoteWriter(to, old);
  changes_.Note(to);
  Truncate(from, rest);
  return {};
}

Status Arena::Fill(std::int64_t slot, std::int64_t begin, std::int64_t end, int byte) {
  for (std::int64_t range = 0; begin < end && range < geometry_.num_ranges(); ++range) {
    KVPAGE_RETURN_IF_ERROR(
        vmm_->Fill(geometry_.Offset(slot, range, begin), (end - begin) * geometry_.block_bytes, byte));
  }
  return {};
}

void Arena::ZeroTail(std::int64_t slot, std::int64_t layer, std::int64_t token) {
  const KVView view = geometry_.View(base());
  const std::int64_t end = blocks(slot) * geometry_.block_tokens;
  for (std::int64_t t = std::max(token, hole(slot) * geometry_.block_tokens); t < end; ++t) {
    geometry_.ZeroToken(view, slot, t, layer);
  }
}

Status Arena::OpenWindow() {
  char* window = nullptr;
  KVPAGE_RETURN_IF_ERROR(vmm_->Window(&window));
  window_.store(window, std::memory_order_release);
  return {};
}

std::int64_t Arena::Trim() {
  const std::vector<std::int32_t> cooled = pool_.Cool(pool_.num_warm());
  // A punch that fails leaves the memory allocated and the block cold: creating it again is harmless.
  static_cast<void>(vmm_->Destroy(cooled.data(), static_cast<std::int64_t>(cooled.size())));
  pool_.SortCold();  // when a call is undone, all joined pools hand out the same blocks again
  return static_cast<std::int64_t>(cooled.size());
}

Status Arena::SetBudget(std::int64_t budget_blocks) {
  if (budget_blocks > pool_.num_blocks()) {
    KVPAGE_RETURN_IF_ERROR(vmm_->Grow(budget_blocks));
    // Before any slot gets a block that exists only in the extended window.
    if (window() != nullptr) KVPAGE_RETURN_IF_ERROR(OpenWindow());
  }
  const std::int64_t excess = pool_.num_used() + pool_.num_warm() - budget_blocks;
  if (excess > 0) {
    const std::vector<std::int32_t> cooled = pool_.Cool(excess);
    KVPAGE_RETURN_IF_ERROR(vmm_->Destroy(cooled.data(), static_cast<std::int64_t>(cooled.size())));
    if (const auto number = static_cast<std::int64_t>(cooled.size()); number < excess) {
      return ResourceExhausted("resize: " + std::to_string(excess - number) +
                               " blocks are being copied to the store: call it again in a moment");
    }
  }
  pool_.SetBudget(budget_blocks);
  return {};
}

}  // namespace kvpage
