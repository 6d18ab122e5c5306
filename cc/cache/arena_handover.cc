// The part of Arena for handed-over blocks, whose memory the pool never reuses.
#include <algorithm>
#include <unordered_set>

#include "cache/arena.h"

namespace kvpage {

Status Arena::ClaimNumbers(std::int64_t count, std::vector<std::int32_t>* blocks) {
  std::vector<std::int32_t> cold;
  if (!pool_.Claim(count, -1, blocks, &cold)) {
    return ResourceExhausted(std::to_string(count) + " blocks wanted, " + std::to_string(pool_.num_free()) + " free",
                             Reason::kOutOfBlocks);
  }
  const std::unordered_set<std::int32_t> was_cold(cold.begin(), cold.end());
  std::sort(blocks->begin(), blocks->end());
  std::vector<std::int32_t> warm;
  for (const std::int32_t block : *blocks) {
    if (was_cold.count(block) == 0) warm.push_back(block);
  }
  // A punch that fails leaves the memory allocated: creating the block again is harmless.
  static_cast<void>(vmm_->Destroy(warm.data(), static_cast<std::int64_t>(warm.size())));
  return {};
}

Status Arena::Receive(const std::shared_ptr<MemoryFile>& file, const std::vector<std::int32_t>& blocks,
                      const std::vector<std::int64_t>& offsets) {
  const auto count = static_cast<std::int64_t>(blocks.size());
  KVPAGE_RETURN_IF_ERROR(vmm_->Lend(file, blocks.data(), offsets.data(), count));
  for (const std::int32_t block : blocks) pool_.SetBacking(block, Backing::kReceived);
  pool_.NotePeak();
  return {};
}

Status Arena::ReceiveHandles(const std::vector<int>& descriptors, const std::vector<std::int32_t>& blocks) {
  KVPAGE_RETURN_IF_ERROR(vmm_->Import(descriptors, blocks.data()));
  for (const std::int32_t block : blocks) pool_.SetBacking(block, Backing::kReceived);
  pool_.NotePeak();
  return {};
}

void Arena::SetFile(std::int64_t slot, std::shared_ptr<MemoryFile> file, std::int64_t begin) {
  files_[static_cast<std::int32_t>(slot)] = {std::move(file), begin};
  changes_.Note(slot);
}

Status Arena::GrowInFile(std::int64_t slot, std::int64_t blocks) {
  const std::int64_t ranges = geometry_.num_ranges(), old = this->blocks(slot), more = blocks - old;
  const auto& [file, begin] = files_.at(static_cast<std::int32_t>(slot));
  std::vector<std::int32_t> claimed;  // [ranges, more]
  KVPAGE_RETURN_IF_ERROR(ClaimNumbers(more * ranges, &claimed));
  std::vector<std::int64_t> offsets;
  for (std::int64_t i = 0; i < more * ranges; ++i) {
    offsets.push_back(begin + (i / more * geometry_.max_blocks() + old + i % more) * geometry_.block_bytes);
  }
  if (Status status = vmm_->Lend(file, claimed.data(), offsets.data(), more * ranges); !status.ok()) {
    UnclaimNumbers(claimed);
    return status;
  }
  for (const std::int32_t block : claimed) pool_.SetBacking(block, Backing::kLent);
  for (std::int64_t range = 0; range < ranges; ++range) {
    const std::int64_t offset = geometry_.Offset(slot, range, old);
    Status status = vmm_->Map(offset, &claimed[range * more], more);
    if (status.ok() && shares_handles()) {
      // Unlike a new file, new device memory may hold old data, and bytes not overwritten with tokens would leak to the
      // receiver.
      status = vmm_->Fill(offset, more * geometry_.block_bytes, 0);
      if (!status.ok()) static_cast<void>(vmm_->Unmap(offset, &claimed[range * more], more));
    }
    if (status.ok()) continue;
    while (--range >= 0) {
      static_cast<void>(vmm_->Unmap(geometry_.Offset(slot, range, old), &claimed[range * more], more));
    }
    Drop(claimed);
    return status;
  }
  Append(slot, claimed);
  pool_.NotePeak();
  return {};
}

std::shared_ptr<MemoryFile> Arena::WholeFile(std::int64_t slot, std::int64_t blocks) const {
  const auto found = files_.find(static_cast<std::int32_t>(slot));
  if (found == files_.end()) return nullptr;
  const auto& [file, begin] = found->second;
  const std::int64_t ranges = geometry_.num_ranges();
  if (blocks > this->blocks(slot) || vmm_->NumLent(*file) != blocks * ranges) return nullptr;
  for (std::int64_t i = 0; i < blocks * ranges; ++i) {
    const std::int64_t place = i % ranges * geometry_.max_blocks() + i / ranges;
    if (vmm_->LentOffset(*file, maps_[slot][i]) != begin + place * geometry_.block_bytes) return nullptr;
  }
  return file;
}

Status Arena::SealFile(std::int64_t slot, std::int64_t blocks) {
  const std::int64_t ranges = geometry_.num_ranges();
  const std::shared_ptr<MemoryFile> file = files_.at(static_cast<std::int32_t>(slot)).file;
  Status status;
  std::int64_t range = 0;
  for (; status.ok() && range < ranges; ++range) {
    status = vmm_->MapReadOnly(geometry_.Offset(slot, range, 0), Gather(slot, range, 0, blocks).data(), blocks);
  }
  if (status.ok()) status = vmm_->Seal(file);
  while (!status.ok() && range-- > 0) {
    const Status back = vmm_->Map(geometry_.Offset(slot, range, 0), Gather(slot, range, 0, blocks).data(), blocks);
    if (!back.ok()) return Internal(status.message() + "; mapping again failed too: " + back.message());
  }
  KVPAGE_RETURN_IF_ERROR(status);
  for (std::int64_t i = 0; i < blocks * ranges; ++i) pool_.SetBacking(maps_[slot][i], Backing::kSealed);
  Borrower& borrower = borrowers_[static_cast<std::int32_t>(slot)];
  borrower.read_only = std::max(borrower.read_only, blocks);
  CloseFile(slot);
  changes_.Note(slot);
  return {};
}

}  // namespace kvpage
