#include "device/block_table_mirror.h"

#include <algorithm>
#include <cstddef>

namespace kvpage {

Status BlockTableMirror::Make(DeviceState* device, const Geometry& geometry, const BlockTable* table,
                              std::unique_ptr<BlockTableMirror>* out) {
  std::unique_ptr<BlockTableMirror> mirror(new BlockTableMirror(geometry, table));
  const std::int64_t numbers = geometry.max_slots * mirror->row();
  const std::size_t bytes = static_cast<std::size_t>(numbers) * sizeof(std::int32_t);
  KVPAGE_RETURN_IF_ERROR(DeviceMemory::Make(device->context(), bytes, "for a block table", &mirror->memory_));
  KVPAGE_RETURN_IF_ERROR(PinnedMemory::Make(device->context(), bytes, "for a block table", &mirror->pinned_));
  mirror->image_ = reinterpret_cast<std::int32_t*>(mirror->pinned_.data());
  std::fill_n(mirror->image_, numbers, -1);
  for (std::int64_t slot = 0; slot < geometry.max_slots; ++slot) mirror->Refresh(slot);
  KVPAGE_RETURN_IF_ERROR(
      device->Transfer({{DeviceState::Copy::kToDevice, mirror->memory_.address(), mirror->image_, bytes}}));
  *out = std::move(mirror);
  return {};
}

KVView BlockTableMirror::View(char* window) const {
  KVView view = geometry_.TableView(window);
  view.table = reinterpret_cast<const std::int32_t*>(memory_.address());
  view.table_width = row();
  view.table_kv_stride = geometry_.table_ranges() > 1 ? geometry_.max_blocks() : 0;
  return view;
}

BlockTableMirror::Span BlockTableMirror::Refresh(std::int64_t slot) {
  const std::vector<std::int32_t>& map = (*table_)[slot];  // [logical blocks, ranges]
  const std::int64_t ranges = geometry_.num_ranges(), blocks = static_cast<std::int64_t>(map.size()) / ranges;
  const std::int64_t first = slot * row();
  std::int64_t begin = -1, end = -1;
  for (std::int64_t range = 0; range < ranges; ++range) {
    std::int32_t* const image = image_ + first + range * geometry_.max_blocks();
    for (std::int64_t i = 0; i < blocks; ++i) {
      const std::int32_t block = map[i * ranges + range];
      if (image[i] == block) continue;
      image[i] = block;
      end = image + i + 1 - image_;
      if (begin < 0) begin = end - 1;
    }
  }
  return {begin, end - begin};
}

void BlockTableMirror::Update(std::int64_t slot, std::vector<DeviceState::Copy>* copies) {
  const Span span = Refresh(slot);
  if (span.count == 0) return;
  under_way_.push_back(span);
  copies->push_back({DeviceState::Copy::kToDevice,
                     memory_.address() + static_cast<cu::DevicePtr>(span.begin) * sizeof(std::int32_t),
                     image_ + span.begin, static_cast<std::size_t>(span.count) * sizeof(std::int32_t)});
}

void BlockTableMirror::Arrived(bool all) {
  for (const Span& span : under_way_) {
    if (!all) std::fill_n(image_ + span.begin, span.count, -1);
  }
  under_way_.clear();
}

void BlockTableMirror::Abandon() {
  memory_.Abandon();
  pinned_.Abandon();
}

}  // namespace kvpage
