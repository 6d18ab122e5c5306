// BlockTableMirror: the device-side copy of a pool's block table, for kernels that address blocks by number
// (addressing="table").
//
// It has a row of max_blocks numbers for each slot and range. Only numbers that differ from those on the device are
// copied, for example those of new blocks when a slot grows.
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
  // Copies the whole table. The caller of this and of Update must hold the mapping mutex.
  static Status Make(DeviceState* device, const Geometry& geometry, const BlockTable* table,
                     std::unique_ptr<BlockTableMirror>* out);

  // The view of layer 0 through the copy (Geometry::TableView). Each layer's rows are layer_stride() numbers after
  // those of the previous layer.
  KVView View(char* window) const;
  std::int64_t layer_stride() const { return geometry_.table_ranges() > 1 ? 2 * geometry_.max_blocks() : 0; }

  // Appends the copy that brings a slot's rows on the device up to date, if one is needed. Call Arrived after the
  // transfer.
  void Update(std::int64_t slot, std::vector<DeviceState::Copy>* copies);
  // Reports whether the transfer succeeded. If not, the state on the device is unknown, and the next Update copies the
  // numbers again.
  void Arrived(bool all);

  // Gives up the memory without freeing it, because something may still use it.
  void Abandon();

 private:
  struct Span {
    std::int64_t begin = 0, count = 0;
  };

  BlockTableMirror(const Geometry& geometry, const BlockTable* table) : geometry_(geometry), table_(table) {}
  // Numbers per slot, for all ranges.
  std::int64_t row() const { return geometry_.num_ranges() * geometry_.max_blocks(); }
  // Writes the slot's numbers to the image. Returns the span from the first to the last number that differed.
  Span Refresh(std::int64_t slot);

  const Geometry geometry_;
  const BlockTable* const table_;
  DeviceMemory memory_;
  PinnedMemory pinned_;
  std::int32_t* image_ = nullptr;  // [max_slots, ranges, max_blocks] state on the device; -1: unknown or none
  std::vector<Span> under_way_;
};

}  // namespace kvpage

#endif  // KVPAGE_DEVICE_BLOCK_TABLE_MIRROR_H_
