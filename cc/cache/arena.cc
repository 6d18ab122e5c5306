#include "cache/arena.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace kvpage {

Arena::Arena(const Geometry& geometry, std::int64_t budget_blocks, std::unique_ptr<Vmm> vmm)
    : geometry_(geometry),
      pool_(budget_blocks),
      vmm_(std::move(vmm)),
      num_blocks_(geometry.max_slots, 0),
      blocks_(geometry.max_slots * geometry.num_ranges()) {}

Status Arena::Make(const Geometry& geometry, std::int64_t budget_blocks, std::unique_ptr<Vmm> vmm,
                   std::unique_ptr<Arena>* out) {
  KVPAGE_RETURN_IF_ERROR(vmm->Grow(budget_blocks));
  out->reset(new Arena(geometry, budget_blocks, std::move(vmm)));
  return {};
}

template <class Visit>
void Arena::ForEachMapping(Visit visit) const {
  for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) {
    for (std::int64_t range = 0; range < geometry_.num_ranges(); ++range) {
      for (const std::int32_t block : block_map(slot, range)) visit(slot, block);
    }
  }
}

std::int64_t Arena::ExclusiveTail(std::int64_t slot, std::int64_t most) const {
  most = std::min(most, num_blocks_[slot]);
  if (pool_.num_shared() == 0) return most;
  const auto exclusive = [&](std::int64_t logical) {
    for (std::int64_t range = 0; range < geometry_.num_ranges(); ++range) {
      if (pool_.references(block_map(slot, range)[logical]) > 1) return false;
    }
    return true;
  };
  std::int64_t run = 0;
  while (run < most && exclusive(num_blocks_[slot] - 1 - run)) ++run;
  return run;
}

std::int64_t Arena::FreedBy(const std::vector<std::int8_t>& given_up) const {
  std::int64_t freed = 0;
  if (pool_.num_shared() == 0) {
    for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) freed += given_up[slot] != 0 ? mappings(slot) : 0;
    return freed;
  }
  std::vector<std::int32_t> dropped(pool_.num_blocks(), 0);  // references, of each block
  ForEachMapping([&](std::int64_t slot, std::int32_t block) {
    if (given_up[slot] != 0 && ++dropped[block] == pool_.references(block)) ++freed;
  });
  return freed;
}

std::vector<std::int64_t> Arena::CountByClass(const std::vector<std::int8_t>& classes, int num_classes) const {
  std::vector<std::int64_t> counts(num_classes, 0);
  if (pool_.num_shared() == 0) {
    for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) counts[classes[slot]] += mappings(slot);
    return counts;
  }
  std::vector<std::int8_t> lowest(pool_.num_blocks(), static_cast<std::int8_t>(num_classes));
  ForEachMapping(
      [&](std::int64_t slot, std::int32_t block) { lowest[block] = std::min(lowest[block], classes[slot]); });
  for (const std::int8_t number : lowest) {
    if (number < num_classes) ++counts[number];
  }
  return counts;
}

Status Arena::Grow(std::int64_t slot, std::int64_t blocks) {
  const std::int64_t ranges = geometry_.num_ranges();
  const std::int64_t old = num_blocks_[slot];
  const std::int64_t more = blocks - old;
  if (more <= 0) return {};
  std::vector<std::int32_t> claimed;
  std::vector<std::int32_t> cold;
  claimed.reserve(more * ranges);
  for (std::int64_t range = 0; range < ranges; ++range) {
    const std::vector<std::int32_t>& map = block_map(slot, range);
    const std::int32_t after = !map.empty() ? map.back() : claimed.empty() ? -1 : claimed.back();
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
    pool_.Unclaim(claimed, {});  // created by now: they stay warm
    return status;
  }
  for (std::int64_t range = 0; range < ranges; ++range) {
    std::vector<std::int32_t>& map = blocks_[slot * ranges + range];
    map.insert(map.end(), claimed.begin() + range * more, claimed.begin() + (range + 1) * more);
  }
  num_blocks_[slot] = blocks;
  pool_.NotePeak();
  return {};
}

Status Arena::Shrink(std::int64_t slot, std::int64_t blocks) {
  const std::int64_t ranges = geometry_.num_ranges();
  const std::int64_t fewer = num_blocks_[slot] - blocks;
  if (fewer <= 0) return {};
  for (std::int64_t range = 0; range < ranges; ++range) {
    Status status = vmm_->Unmap(geometry_.Offset(slot, range, blocks), block_map(slot, range).data() + blocks, fewer);
    if (status.ok()) continue;
    for (std::int64_t r = 0; r < range; ++r) {
      const Status rollback = vmm_->Map(geometry_.Offset(slot, r, blocks), block_map(slot, r).data() + blocks, fewer);
      if (!rollback.ok()) status = Internal(status.message() + "; mapping again failed too: " + rollback.message());
    }
    return status;
  }
  for (std::int64_t range = 0; range < ranges; ++range) {
    std::vector<std::int32_t>& map = blocks_[slot * ranges + range];
    // Backwards, so that the free list hands them out again in their old order.
    for (std::int64_t i = static_cast<std::int64_t>(map.size()) - 1; i >= blocks; --i) pool_.Release(map[i]);
    map.resize(blocks);
  }
  num_blocks_[slot] = blocks;
  return {};
}

Status Arena::Alias(std::int64_t from, std::int64_t to, std::int64_t blocks) {
  const std::int64_t ranges = geometry_.num_ranges();
  const std::int64_t old = num_blocks_[to], more = blocks - old;
  if (more <= 0) return {};
  for (std::int64_t range = 0; range < ranges; ++range) {
    Status status = vmm_->Map(geometry_.Offset(to, range, old), block_map(from, range).data() + old, more);
    if (status.ok()) continue;
    while (--range >= 0) {
      static_cast<void>(vmm_->Unmap(geometry_.Offset(to, range, old), block_map(from, range).data() + old, more));
    }
    return status;
  }
  for (std::int64_t range = 0; range < ranges; ++range) {
    const std::vector<std::int32_t>& source = blocks_[from * ranges + range];
    std::vector<std::int32_t>& target = blocks_[to * ranges + range];
    target.insert(target.end(), source.begin() + old, source.begin() + blocks);
    for (std::int64_t i = old; i < blocks; ++i) pool_.AddReference(source[i]);
  }
  num_blocks_[to] = blocks;
  return {};
}

Status Arena::Move(std::int64_t from, std::int64_t to, std::int64_t blocks) {
  if (blocks <= 0) return {};
  const std::int64_t ranges = geometry_.num_ranges();
  const std::int64_t rest = num_blocks_[from] - blocks, old = num_blocks_[to];
  const auto move = [&](std::int64_t range, bool back) {
    const std::int64_t here = geometry_.Offset(from, range, rest), there = geometry_.Offset(to, range, old);
    return vmm_->Move(back ? there : here, back ? here : there, block_map(from, range).data() + rest, blocks);
  };
  for (std::int64_t range = 0; range < ranges; ++range) {
    Status status = move(range, /*back=*/false);
    if (status.ok()) continue;
    while (--range >= 0) static_cast<void>(move(range, /*back=*/true));
    return status;
  }
  for (std::int64_t range = 0; range < ranges; ++range) {
    std::vector<std::int32_t>& source = blocks_[from * ranges + range];
    std::vector<std::int32_t>& target = blocks_[to * ranges + range];
    target.insert(target.end(), source.begin() + rest, source.end());
    source.resize(rest);
  }
  num_blocks_[from] = rest;
  num_blocks_[to] = old + blocks;
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
  const std::int64_t row = geometry_.head_dim * static_cast<std::int64_t>(ItemSize(geometry_.dtype));
  const std::int64_t end = num_blocks_[slot] * geometry_.block_tokens;
  for (std::int64_t t = token; t < end; ++t) {
    for (std::int64_t head = 0; head < geometry_.num_kv_heads; ++head) {
      for (int kv = 0; kv < 2; ++kv) {
        std::memset(view.At(slot, t, layer, kv, head), 0, static_cast<std::size_t>(row));
        if (IsQuantized(view.dtype)) *view.Scale(slot, t, layer, kv, head) = 0.0f;
      }
    }
  }
}

std::int64_t Arena::Trim() {
  const std::vector<std::int32_t> cooled = pool_.Cool(pool_.num_warm());
  // A punch that fails leaves the memory allocated and the block cold: creating it again is harmless.
  static_cast<void>(vmm_->Destroy(cooled.data(), static_cast<std::int64_t>(cooled.size())));
  return static_cast<std::int64_t>(cooled.size());
}

Status Arena::SetBudget(std::int64_t budget_blocks) {
  if (budget_blocks > pool_.num_blocks()) KVPAGE_RETURN_IF_ERROR(vmm_->Grow(budget_blocks));
  const std::int64_t excess = pool_.num_used() + pool_.num_warm() - budget_blocks;
  if (excess > 0) {
    const std::vector<std::int32_t> cooled = pool_.Cool(excess);
    KVPAGE_RETURN_IF_ERROR(vmm_->Destroy(cooled.data(), static_cast<std::int64_t>(cooled.size())));
  }
  pool_.SetBudget(budget_blocks);
  return {};
}

}  // namespace kvpage
