#include "device/run_mirror.h"

#include <algorithm>
#include <cstddef>

namespace kvpage {

Status RunMirror::Make(DeviceState* device, const Geometry& geometry, std::unique_ptr<RunMirror>* out) {
  std::unique_ptr<RunMirror> mirror(new RunMirror(device, geometry));
  const std::int64_t slots = geometry.max_slots, width = geometry.max_blocks();
  const std::size_t on_device = static_cast<std::size_t>(slots * (width + 1)) * sizeof(std::int32_t);
  const std::size_t on_host = static_cast<std::size_t>(slots + width) * sizeof(std::int32_t);
  KVPAGE_RETURN_IF_ERROR(
      DeviceMemory::Make(device->context(), on_device, "for lists of shared blocks", &mirror->memory_));
  KVPAGE_RETURN_IF_ERROR(
      PinnedMemory::Make(device->context(), on_host, "for lists of shared blocks", &mirror->pinned_));
  mirror->counts_ = reinterpret_cast<std::int32_t*>(mirror->pinned_.data());
  mirror->blocks_ = mirror->counts_ + slots;
  std::fill_n(mirror->counts_, slots, 0);
  KVPAGE_RETURN_IF_ERROR(device->Transfer({{DeviceState::Copy::kZero, mirror->memory_.address(), nullptr, on_device}}));
  *out = std::move(mirror);
  return {};
}

RunMirror::~RunMirror() {
  for (std::int32_t slot = 0; counts_ != nullptr && slot < geometry_.max_slots; ++slot) SetCount(slot, 0);
}

DeviceRuns RunMirror::View() const {
  DeviceRuns runs;
  runs.counts = reinterpret_cast<const std::int32_t*>(memory_.address());
  runs.blocks = runs.counts + geometry_.max_slots;
  runs.width = width();
  return runs;
}

void RunMirror::SetCount(std::int32_t slot, std::int64_t count) {
  const int change = (count > 0 ? 1 : 0) - (counts_[slot] > 0 ? 1 : 0);
  counts_[slot] = static_cast<std::int32_t>(count);
  if (change != 0) device_->AddRuns(change);
}

DeviceState::Copy RunMirror::CountCopy(std::int32_t slot) const {
  return {DeviceState::Copy::kToDevice, reinterpret_cast<cu::DevicePtr>(View().counts + slot), &counts_[slot],
          sizeof(std::int32_t)};
}

Status RunMirror::Extend(std::int32_t slot, std::int64_t begin, const std::int32_t* blocks, std::int64_t count) {
  // A failed call leaves a gap.
  if (counts_[slot] != begin) return FailedPrecondition("blocks before these are missing");
  std::copy_n(blocks, count, blocks_);
  const auto at = reinterpret_cast<cu::DevicePtr>(View().blocks + slot * width() + begin);
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(std::int32_t);
  // Blocks first: a kernel that sees the count also sees the blocks.
  KVPAGE_RETURN_IF_ERROR(device_->Transfer({{DeviceState::Copy::kToDevice, at, blocks_, bytes}}));
  SetCount(slot, begin + count);
  return device_->Transfer({CountCopy(slot)});
}

Status RunMirror::Cut(std::int32_t slot, std::int64_t blocks, const DeviceState::Copy& count_cut) {
  const std::int32_t before = counts_[slot];
  SetCount(slot, blocks);
  Status status = device_->Transfer({CountCopy(slot), count_cut});
  if (!status.ok()) SetCount(slot, before);
  return status;
}

void RunMirror::Abandon() {
  memory_.Abandon();
  pinned_.Abandon();
}

}  // namespace kvpage
