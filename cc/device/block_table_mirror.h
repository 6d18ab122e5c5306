// BlockTableMirror: the device-side copy of a pool's block table, which kernels read that address blocks by number
// (addressing="table").
//
// A row of max_blocks numbers for each slot and range. Only numbers that differ from what the device has are copied:
// when a slot grows, those of its new blocks.
#ifndef KVPAGE_DEVICE_BLOCK_TABLE_MIRROR_H_
#define KVPAGE_DEVICE_BLOCK_TABLE_MIRROR_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "base/kv_view.h"
#include "cache/block_table.h"
#include "cache/geometry.h"
#include "device/device_state.h"

namespace kvpage {

class BlockTableMirror {
 public:
  // Copies the whole table. The mapping mutex is held here and in Update.
  static Status Make(DeviceState* device, const Geometry& geometry, const BlockTable* table,
                     std::unique_ptr<BlockTableMirror>* out);

  // The view of layer 0 through the copy (Geometry::TableView); the rows of the next layer begin layer_stride() numbers
  // behind.
  KVView View(char* window) const;
  std::int64_t layer_stride() const { return geometry_.table_ranges() > 1 ? 2 * geometry_.max_blocks() : 0; }

  // Adds the copy that brings a slot's rows on the device up to date, if they are not. After the transfer call Arrived.
  void Update(std::int64_t slot, std::vector<DeviceState::Copy>* copies);
  // Whether the transfer succeeded. If not, nobody knows what the device has there: the next Update copies it again.
  void Arrived(bool all);

  // Drops the memory without freeing it, because something may still use it.
  void Abandon();

 private:
  struct Span {
    std::int64_t begin = 0, count = 0;
  };

  BlockTableMirror(const Geometry& geometry, const BlockTable* table) : geometry_(geometry), table_(table) {}
  // Numbers of a slot, in all ranges.
  std::int64_t row() const { return geometry_.num_ranges() * geometry_.max_blocks(); }
  // Writes the slot's numbers to the image. Returns the span from the first one that differed to the last.
  Span Refresh(std::int64_t slot);

  const Geometry geometry_;
  const BlockTable* const table_;
  DeviceMemory memory_;
  PinnedMemory pinned_;
  std::int32_t* image_ = nullptr;  // [max_slots, ranges, max_blocks] what the device has; -1: unknown, or nothing
  std::vector<Span> under_way_;
};

}  // namespace kvpage

#endif  // KVPAGE_DEVICE_BLOCK_TABLE_MIRROR_H_
