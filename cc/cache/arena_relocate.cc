// The part of Arena that replaces one physical block by another, and counts the memory mappings that this saves.
#include <algorithm>
#include <string>

#include "cache/arena.h"

namespace kvpage {

Status Arena::Exchange(std::int32_t from, std::int32_t to, const Place& at, const std::vector<std::int32_t>& mappers,
                       const std::vector<std::int32_t>& holders, bool* created) {
  bool cold = false;
  if (!pool_.ClaimBlock(to, &cold)) return Internal("block " + std::to_string(to) + " is not free");
  *created = cold;
  if (cold && pool_.num_used() + pool_.num_warm() > pool_.budget()) {
    // The budget limits the allocated memory at every moment, so another free block gives up its memory for this one.
    const std::vector<std::int32_t> cooled = pool_.Cool(1);
    static_cast<void>(vmm_->Destroy(cooled.data(), static_cast<std::int64_t>(cooled.size())));
    *created = false;
  }
  const auto offset = [&](std::int32_t slot) { return geometry_.Offset(slot, at.range, at.logical); };
  const auto writable = [&](std::int32_t slot) { return at.logical >= ReadOnlyBlocks(slot); };
  Status status = cold ? vmm_->Create(&to, 1) : Status();
  if (status.ok()) status = vmm_->Copy(&from, &to, 1);
  for (std::size_t i = 0; status.ok() && i < mappers.size(); ++i) {
    status = vmm_->Exchange(offset(mappers[i]), from, to, writable(mappers[i]));
    while (!status.ok() && i-- > 0) {
      const Status rollback = vmm_->Exchange(offset(mappers[i]), to, from, writable(mappers[i]));
      if (!rollback.ok()) return Internal(status.message() + "; mapping again failed too: " + rollback.message());
    }
  }
  if (!status.ok()) {
    pool_.Unclaim({to}, {});
    if (*created) Cool(to);
    return status;
  }
  const auto breaks = [&](std::int32_t slot, std::int64_t read_only) {
    const std::int64_t ranges = geometry_.num_ranges();
    const std::int32_t* const map = maps_[slot].data() + at.range;
    std::int64_t count = 0;
    for (std::int64_t i = at.logical; i < std::min(at.logical + 2, read_only); ++i) {
      count += i == 0 || map[i * ranges] != map[(i - 1) * ranges] + 1;
    }
    return count;
  };
  for (const std::int32_t slot : mappers) {
    const std::int64_t read_only = ReadOnlyBlocks(slot), before = breaks(slot, read_only);
    maps_.Replace(slot, at.logical, at.range, to);
    if (at.logical >= read_only) continue;
    const std::int64_t more = breaks(slot, read_only) - before;
    borrowers_[slot].mappings += more;
    extra_mappings_ += more;
  }
  if (at.range == 0 && !mappers.empty()) shared_runs_.Replace(at.logical, from, to);
  if (from < static_cast<std::int64_t>(writers_.size())) {
    writers_.resize(pool_.num_blocks(), -1);
    writers_[to] = writers_[from];
  }
  for (const std::int32_t slot : holders) held_.push_back({slot, from});
  pool_.Replace(from, to, static_cast<std::int32_t>(holders.size()));
  return {};
}

void Arena::Cool(std::int32_t block) {
  pool_.CoolBlock(block);
  static_cast<void>(vmm_->Destroy(&block, 1));
}

std::int64_t Arena::CountMemoryMappings() const {
  const std::int64_t ranges = geometry_.num_ranges();
  std::int64_t count = 0;
  for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) {
    const std::int32_t* const map = maps_[slot].data();
    const std::int64_t begin = hole(slot), end = blocks(slot), read_only = ReadOnlyBlocks(slot);
    for (std::int64_t i = begin * ranges; i < end * ranges; ++i) {
      const std::int64_t logical = i / ranges;
      count += logical == begin || logical == read_only || map[i] != map[i - ranges] + 1;
    }
  }
  return count;
}

}  // namespace kvpage
