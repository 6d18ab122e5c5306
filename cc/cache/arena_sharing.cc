// The part of Arena that maps one block in several slots, and undoes it.
#include <algorithm>
#include <string>
#include <unordered_map>

#include "cache/arena.h"

namespace kvpage {

std::int64_t Arena::SharedBlocks(std::int64_t slot) const {
  if (pool_.num_shared() == 0 && pool_.num_cached() == 0 && pool_.num_sealed() == 0) return 0;
  const std::int64_t ranges = geometry_.num_ranges(), mapped = blocks(slot), read_only = ReadOnlyBlocks(slot);
  const auto others = [&](std::int64_t logical) {
    const std::int32_t block = maps_[slot][logical * ranges];
    if (pool_.references(block) > 1 || pool_.sealed(block)) return true;
    return logical < read_only && pool_.cached(block);
  };
  std::int64_t shared = mapped;
  while (shared > hole(slot) && !others(shared - 1)) --shared;
  return shared > hole(slot) ? shared : 0;
}

std::int64_t Arena::CountShared(std::int64_t slot) const {
  std::int64_t count = 0;
  for (std::int64_t i = hole(slot); pool_.num_shared() > 0 && i < blocks(slot); ++i) {
    count += pool_.references(maps_[slot][i * geometry_.num_ranges()]) > 1;
  }
  return count;
}

bool Arena::HasCached(std::int64_t slot, std::int64_t begin) const {
  if (pool_.num_cached() == 0) return false;
  const std::int64_t ranges = geometry_.num_ranges(), mapped = blocks(slot);
  begin = std::max(begin, hole(slot));
  while (begin < mapped && !pool_.cached(maps_[slot][begin * ranges])) ++begin;
  return begin < mapped;
}

std::int64_t Arena::UncachedTail(std::int64_t slot) const {
  const std::int64_t ranges = geometry_.num_ranges(), end = blocks(slot), mapped = end - hole(slot);
  if (pool_.num_cached() == 0) return mapped;
  std::int64_t run = 0;
  while (run < mapped && !pool_.cached(maps_[slot][(end - run - 1) * ranges])) ++run;
  return run;
}

Status Arena::CopyBlock(std::int64_t slot, std::int64_t logical, const std::int32_t* from) {
  const std::int64_t ranges = geometry_.num_ranges();
  return vmm_->Copy(from, &maps_[slot][logical * ranges], ranges);
}

std::int64_t Arena::ReadOnlyBlocks(std::int64_t slot) const {
  const auto found = borrowers_.find(static_cast<std::int32_t>(slot));
  return found == borrowers_.end() ? 0 : found->second.read_only;
}

std::vector<std::int32_t> Arena::Mappers(std::int64_t slot, std::int64_t range, std::int64_t logical) const {
  const auto at = static_cast<std::size_t>(logical * geometry_.num_ranges() + range);
  const std::int32_t block = maps_[slot][at];
  if (block < 0) return {};
  if (pool_.references(block) == 1) return {static_cast<std::int32_t>(slot)};
  std::vector<std::int32_t> slots;
  for (std::int64_t other = 0; other < geometry_.max_slots; ++other) {
    if (at < maps_[other].size() && maps_[other][at] == block) slots.push_back(static_cast<std::int32_t>(other));
  }
  return slots;
}

std::int64_t Arena::AliasMappings(const std::int32_t* map, std::int64_t blocks) const {
  const std::int64_t ranges = geometry_.num_ranges();
  if (blocks <= 0) return 0;
  std::int64_t mappings = 2 * ranges;  // the first block of each range, and what follows: writable blocks or a hole
  for (std::int64_t i = ranges; i < blocks * ranges; ++i) mappings += map[i] != map[i - ranges] + 1;
  return mappings;
}

Status Arena::Alias(std::int64_t to, const std::int32_t* map, std::int64_t blocks) {
  const std::int64_t ranges = geometry_.num_ranges();
  if (blocks <= 0) return {};
  std::vector<std::int32_t> run(ranges > 1 ? blocks : 0);
  const auto gather = [&](std::int64_t range) {
    if (ranges == 1) return map;
    for (std::int64_t i = 0; i < blocks; ++i) run[i] = map[i * ranges + range];
    return static_cast<const std::int32_t*>(run.data());
  };
  for (std::int64_t range = 0; range < ranges; ++range) {
    Status status = vmm_->MapReadOnly(geometry_.Offset(to, range, 0), gather(range), blocks);
    if (status.ok()) continue;
    while (--range >= 0) {
      static_cast<void>(vmm_->Unmap(geometry_.Offset(to, range, 0), gather(range), blocks));
    }
    return status;
  }
  for (std::int64_t i = 0; i < blocks * ranges; ++i) pool_.AddReference(map[i]);
  maps_.Assign(to, map, blocks);
  NoteShared(to, map, blocks);
  Borrower& borrower = borrowers_[static_cast<std::int32_t>(to)];
  borrower.read_only = blocks;
  borrower.mappings = AliasMappings(map, blocks);
  extra_mappings_ += borrower.mappings;
  changes_.Note(static_cast<std::int32_t>(to));
  return {};
}

std::vector<std::vector<std::int64_t>> Arena::Missing(const std::vector<std::int32_t>& slots,
                                                      const std::vector<std::int64_t>& begins,
                                                      const OwnsEntry& owns_entry, bool hold) const {
  std::vector<std::vector<std::int64_t>> missing(slots.size());
  std::unordered_map<std::int32_t, std::int32_t> left;  // references left, for shared blocks
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const std::vector<std::int32_t>& map = maps_[slots[i]];
    const auto found = borrowers_.find(slots[i]);
    const std::int64_t end = pool_.num_cached() > 0 ? blocks(slots[i]) : SharedBlocks(slots[i]);
    for (std::int64_t logical = begins[i]; logical < end; ++logical) {
      const std::int32_t block = map[logical * geometry_.num_ranges()];
      const bool writes = pool_.references(block) == 1 && pool_.entries(block) == 1 && owns_entry != nullptr;
      if (writes && owns_entry(slots[i], logical)) continue;
      // The prefix index counts as a user of the block: nobody keeps a block to which it refers.
      const std::int32_t references = pool_.references(block) + (pool_.cached(block) ? 1 : 0);
      std::int32_t& others = left.emplace(block, references).first->second;
      const bool last = others == 1 && !pool_.sealed(block);
      if (!hold) --others;
      const bool set_aside = found != borrowers_.end() && found->second.set_aside.count(logical) > 0;
      if (!last && !set_aside) missing[i].push_back(logical);
    }
  }
  return missing;
}

Status Arena::Claim(std::int64_t count, std::vector<std::int32_t>* blocks) {
  std::vector<std::int32_t> cold;
  if (!pool_.Claim(count, -1, blocks, &cold)) {
    return ResourceExhausted(std::to_string(count) + " blocks wanted, " + std::to_string(pool_.num_free()) + " free",
                             Reason::kOutOfBlocks);
  }
  std::sort(cold.begin(), cold.end());
  if (Status status = vmm_->Create(cold.data(), static_cast<std::int64_t>(cold.size())); !status.ok()) {
    pool_.Unclaim(*blocks, cold);
    blocks->clear();
    return status;
  }
  pool_.NotePeak();
  return {};
}

Status Arena::ClaimToFill(std::int64_t count, std::vector<std::int32_t>* blocks) {
  KVPAGE_RETURN_IF_ERROR(Claim(count, blocks));
  filling_.insert(blocks->begin(), blocks->end());
  return {};
}

void Arena::DropFilled(const std::vector<std::int32_t>& blocks) {
  for (const std::int32_t block : blocks) filling_.erase(block);
  Drop(blocks);
}

Status Arena::SetAside(std::int64_t slot, const std::vector<std::int64_t>& missing) {
  const std::int64_t ranges = geometry_.num_ranges();
  if (missing.empty()) return {};
  const auto count = static_cast<std::int64_t>(missing.size());
  std::vector<std::int32_t> claimed;
  KVPAGE_RETURN_IF_ERROR(Claim(count * ranges, &claimed));
  Borrower& borrower = borrowers_[static_cast<std::int32_t>(slot)];
  for (std::int64_t i = 0; i < count; ++i) {
    borrower.set_aside[missing[i]].assign(claimed.begin() + i * ranges, claimed.begin() + (i + 1) * ranges);
  }
  num_set_aside_ += count * ranges;
  return {};
}

void Arena::DropSetAside(std::int64_t slot, const std::vector<std::int64_t>& logical) {
  const auto found = borrowers_.find(static_cast<std::int32_t>(slot));
  if (found == borrowers_.end()) return;
  for (const std::int64_t number : logical) {
    const auto at = found->second.set_aside.find(number);
    if (at == found->second.set_aside.end()) continue;
    for (const std::int32_t block : at->second) {
      if (block < 0) continue;
      pool_.Release(block);
      --num_set_aside_;
    }
    found->second.set_aside.erase(at);
  }
  if (found->second.set_aside.empty() && found->second.read_only == 0) Forget(slot);
}

void Arena::DropSetAsideFrom(std::int64_t slot, std::int64_t begin) {
  const auto found = borrowers_.find(static_cast<std::int32_t>(slot));
  if (found == borrowers_.end()) return;
  std::vector<std::int64_t> logical;
  for (const auto& [number, unused] : found->second.set_aside) {
    if (number >= begin) logical.push_back(number);
  }
  DropSetAside(slot, logical);
}

Status Arena::Separate(std::int64_t slot, std::int64_t begin, bool hold) {
  const std::int64_t ranges = geometry_.num_ranges();
  begin = std::max(begin, hole(slot));
  KVPAGE_RETURN_IF_ERROR(shared_runs_.Cut(slot, begin));
  // From the end, so that the shared blocks remain the beginning of the slot. The first range is last, because it
  // determines whether a block counts as shared (SharedBlocks).
  std::int64_t end = std::max(SharedBlocks(slot), ReadOnlyBlocks(slot));
  const auto found = borrowers_.find(static_cast<std::int32_t>(slot));
  if (found != borrowers_.end() && !found->second.set_aside.empty()) {
    // Blocks that others shared when blocks were set aside may still be cached, and the slot must not write them.
    end = std::max(end, found->second.set_aside.rbegin()->first + 1);
  }
  for (std::int64_t logical = end; logical-- > begin;) {
    Borrower& borrower = borrowers_[static_cast<std::int32_t>(slot)];
    const auto set_aside = borrower.set_aside.find(logical);
    const bool has_copy = set_aside != borrower.set_aside.end();
    for (std::int64_t range = ranges; range-- > 0;) {
      const std::int32_t old_block = maps_[slot][logical * ranges + range];
      std::int32_t block = old_block;  // nobody else uses it any more, so only the protection changes
      if (pool_.references(old_block) > 1 || pool_.sealed(old_block) || (has_copy && pool_.cached(old_block))) {
        if (!has_copy || set_aside->second[range] < 0) {
          return Internal("truncate: slot " + std::to_string(slot) + ": no block is set aside for block " +
                          std::to_string(logical) + ", which other slots share");
        }
        block = set_aside->second[range];
        KVPAGE_RETURN_IF_ERROR(vmm_->Copy(&old_block, &block, 1));
      }
      KVPAGE_RETURN_IF_ERROR(vmm_->Remap(geometry_.Offset(slot, range, logical), &old_block, &block, 1));
      if (block == old_block) continue;
      maps_.Replace(slot, logical, range, block);  // the slot takes over the reference of the block that was set aside
      set_aside->second[range] = -1;
      --num_set_aside_;
      if (hold) {
        held_.push_back({static_cast<std::int32_t>(slot), old_block});
      } else {
        pool_.Release(old_block);
      }
      borrower.mappings += kSplits;
      extra_mappings_ += kSplits;
    }
    borrower.read_only = std::min(borrower.read_only, logical);
    DropSetAsideFrom(slot, logical);
  }
  DropSetAsideFrom(slot, begin);
  NoteWriter(slot, begin);
  return {};
}

void Arena::ReleaseHeld(const std::vector<bool>& slots) {
  const auto released = [&](const Held& held) {
    if (slots[held.slot]) pool_.Release(held.block);
    return slots[held.slot];
  };
  held_.erase(std::remove_if(held_.begin(), held_.end(), released), held_.end());
}

void Arena::NoteWriter(std::int64_t slot, std::int64_t begin) {
  const std::vector<std::int32_t>& map = maps_[slot];
  for (auto at = static_cast<std::size_t>(begin * geometry_.num_ranges()); at < map.size();
       at += static_cast<std::size_t>(geometry_.num_ranges())) {
    if (map[at] >= static_cast<std::int64_t>(writers_.size())) writers_.resize(pool_.num_blocks(), -1);
    writers_[map[at]] = static_cast<std::int32_t>(slot);
  }
}

// Slots that map some of these blocks already have runs, or write the blocks.
void Arena::NoteShared(std::int64_t to, const std::int32_t* map, std::int64_t blocks) {
  const std::int64_t ranges = geometry_.num_ranges();
  std::int32_t last = -1;
  for (std::int64_t i = 0; i < blocks; ++i) {
    const auto block = static_cast<std::size_t>(map[i * ranges]);
    const std::int32_t writer = block < writers_.size() ? writers_[block] : -1;
    if (writer < 0 || writer == last || writer == to) continue;
    last = writer;
    if (shared_runs_.size(writer) >= blocks) continue;  // an earlier alias has noted as many
    std::int64_t common = 0;
    const std::int64_t most = std::min(blocks, this->blocks(writer));
    while (common < most && maps_[writer][common * ranges] == map[common * ranges]) ++common;
    shared_runs_.Set(writer, map, ranges, common);
  }
  shared_runs_.Set(to, map, ranges, blocks);
}

Status Arena::Audit(const std::vector<std::int32_t>& others) const {
  std::vector<std::int32_t> counts(static_cast<std::size_t>(pool_.num_blocks()));
  const auto count = [&](std::int32_t block) {
    if (block >= 0) ++counts[block];
  };
  for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) {
    std::for_each(maps_[slot].begin(), maps_[slot].end(), count);
  }
  for (const Held& held : held_) count(held.block);
  std::for_each(filling_.begin(), filling_.end(), count);
  for (const auto& [slot, borrower] : borrowers_) {
    for (const auto& [logical, blocks] : borrower.set_aside) std::for_each(blocks.begin(), blocks.end(), count);
  }
  std::for_each(others.begin(), others.end(), count);
  std::int64_t used = 0;
  for (std::int32_t block = 0; block < static_cast<std::int32_t>(counts.size()); ++block) {
    used += counts[block] > 0 || pool_.cached(block);
    if (pool_.entries(block) > 1) {
      return Internal("block " + std::to_string(block) + " has " + std::to_string(pool_.entries(block)) +
                      " entries of the prefix index, at most 1 is expected");
    }
    if (counts[block] == pool_.references(block)) continue;
    return Internal("block " + std::to_string(block) + " has " + std::to_string(pool_.references(block)) +
                    " references, but is mapped, held, set aside, filled or swapped " + std::to_string(counts[block]) +
                    " times");
  }
  if (used == pool_.num_used()) return {};
  return Internal(std::to_string(pool_.num_used()) + " blocks count as used, " + std::to_string(used) + " are");
}

void Arena::Forget(std::int64_t slot) {
  const auto found = borrowers_.find(static_cast<std::int32_t>(slot));
  if (found == borrowers_.end()) return;
  extra_mappings_ -= found->second.mappings;
  borrowers_.erase(found);
}

void Arena::ForgetBeyond(std::int64_t slot, std::int64_t blocks) {
  const auto found = borrowers_.find(static_cast<std::int32_t>(slot));
  if (found == borrowers_.end()) return;
  found->second.read_only = std::min(found->second.read_only, blocks);
  DropSetAsideFrom(slot, blocks);
  if (blocks == 0) Forget(slot);
}

}  // namespace kvpage
