// RunMirror: the device-side copy of a pool's runs (SharedRuns), in which the planner looks for sequences with a common
// prefix.
//
// It has a row of max_blocks numbers for each slot, and the number of valid entries. The memory is allocated when the
// pool first shares a block. Each change is a small synchronous copy (DeviceState::Transfer).
#ifndef KVPAGE_DEVICE_RUN_MIRROR_H_
#define KVPAGE_DEVICE_RUN_MIRROR_H_

#include <cstdint>
#include <memory>

#include "base/device_table.h"
#include "cache/geometry.h"
#include "device/device_state.h"

namespace kvpage {

class RunMirror {
 public:
  // Starts without runs. `device` must outlive the mirror.
  static Status Make(DeviceState* device, const Geometry& geometry, std::unique_ptr<RunMirror>* out);
  ~RunMirror();
  RunMirror(const RunMirror&) = delete;
  RunMirror& operator=(const RunMirror&) = delete;

  // For the pool's entry.
  DeviceRuns View() const;

  // Appends `count` blocks to a slot's run, which must end at `begin`.
  Status Extend(std::int32_t slot, std::int64_t begin, const std::int32_t* blocks, std::int64_t count);
  bool IsLonger(std::int32_t slot, std::int64_t blocks) const { return counts_[slot] > blocks; }
  // Shortens a run that is longer than `blocks` to this length. `count_cut` is copied along: it tells programs of the
  // cut. On failure the run stays as it was.
  Status Cut(std::int32_t slot, std::int64_t blocks, const DeviceState::Copy& count_cut);

  // Gives up the memory without freeing it, because something may still use it.
  void Abandon();

 private:
  RunMirror(DeviceState* device, const Geometry& geometry) : device_(device), geometry_(geometry) {}
  std::int64_t width() const { return geometry_.max_blocks(); }
  // Sets the count on the host, and tells the device state how many runs there are.
  void SetCount(std::int32_t slot, std::int64_t count);
  DeviceState::Copy CountCopy(std::int32_t slot) const;

  DeviceState* const device_;
  const Geometry geometry_;
  DeviceMemory memory_;
  PinnedMemory pinned_;             // the members below point into it
  std::int32_t* counts_ = nullptr;  // [max_slots], as on the device
  std::int32_t* blocks_ = nullptr;  // [max_blocks] source of the copy in Extend
};

}  // namespace kvpage

#endif  // KVPAGE_DEVICE_RUN_MIRROR_H_
