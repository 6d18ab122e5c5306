// RunMirror: the device-side copy of a pool's runs (SharedRuns), in which the planner of a step looks for sequences
// with a common beginning.
//
// A row of max_blocks numbers for each slot, and how many of them hold. A pool has this memory from its first shared
// block on. Each change is a small synchronous copy (DeviceState::Transfer).
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
  // Without runs. `device` outlives the mirror.
  static Status Make(DeviceState* device, const Geometry& geometry, std::unique_ptr<RunMirror>* out);
  ~RunMirror();
  RunMirror(const RunMirror&) = delete;
  RunMirror& operator=(const RunMirror&) = delete;

  // For the pool's entry.
  DeviceRuns View() const;

  // Adds blocks [begin, begin + count) to a slot's run, which ends at `begin`.
  Status Extend(std::int32_t slot, std::int64_t begin, const std::int32_t* blocks, std::int64_t count);
  bool IsLonger(std::int32_t slot, std::int64_t blocks) const { return counts_[slot] > blocks; }
  // Leaves the first `blocks` blocks of a run that is longer. `count_cut` goes with it: it tells programs of the cut.
  // On failure the run stays.
  Status Cut(std::int32_t slot, std::int64_t blocks, const DeviceState::Copy& count_cut);

  // Drops the memory without freeing it, because something may still use it.
  void Abandon();

 private:
  RunMirror(DeviceState* device, const Geometry& geometry) : device_(device), geometry_(geometry) {}
  std::int64_t width() const { return geometry_.max_blocks(); }
  // On the host; tells the device state how many runs there are.
  void SetCount(std::int32_t slot, std::int64_t count);
  DeviceState::Copy CountCopy(std::int32_t slot) const;

  DeviceState* const device_;
  const Geometry geometry_;
  DeviceMemory memory_;
  PinnedMemory pinned_;             // the members below point into it
  std::int32_t* counts_ = nullptr;  // [max_slots], as on the device
  std::int32_t* blocks_ = nullptr;  // [max_blocks] the source of the copy that Extend makes
};

}  // namespace kvpage

#endif  // KVPAGE_DEVICE_RUN_MIRROR_H_
