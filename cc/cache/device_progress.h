// DeviceProgress: what programs have done on one device, as opposed to what the host has decided (slot_table.h).
//
// On CPU, the handlers update it as they run. On a device, the kernels update a copy in device memory, and a mirror
// copies it to the host when a generation starts. A pool over several devices has one for each.
#ifndef KVPAGE_CACHE_DEVICE_PROGRESS_H_
#define KVPAGE_CACHE_DEVICE_PROGRESS_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "base/epoch.h"
#include "base/status.h"
#include "base/written_runs.h"
#include "cache/geometry.h"
#include "cache/shared_faults.h"

namespace kvpage {

struct SlotProgress {
  std::int32_t length = 0;    // as the last completed step left it
  std::uint32_t since = 0;    // epoch of the last destructive change
  std::int32_t pins = 0;      // handlers running on the slot
  std::int32_t by_block = 0;  // of these, handlers with a copy of its row of the block table; with a mirror, 1 if its
                              // copy may contain blocks that the slot no longer has
  std::int32_t shared = 0;    // positions below this are shared and may not be written
  std::int32_t dropped = 0;   // positions below this are gone or about to be: nothing may use them
  bool started = false;       // the program that occupies the slot (acquire, fork) has run; only without a mirror
  bool vacated = false;       // draining, and the release program has run; as read by a mirror: free on the device
};

class DeviceProgress {
 public:
  explicit DeviceProgress(const Geometry& geometry)
      : slots(geometry.max_slots),
        written(geometry.max_slots * geometry.num_layers, 0),
        num_layers_(geometry.num_layers) {}

  // Number of tokens that the slot's occupant has written, [num_layers].
  std::int32_t* Written(std::int64_t slot) { return &written[slot * num_layers_]; }
  std::int32_t WrittenInAllLayers(std::int64_t slot) {
    return *std::min_element(Written(slot), Written(slot) + num_layers_);
  }
  WrittenRuns Runs(std::int64_t slot, std::int32_t limit = std::numeric_limits<std::int32_t>::max()) {
    return FindWrittenRuns(Written(slot), num_layers_, limit);
  }
  // Limits the number of written tokens to `length` in every layer.
  void LowerWritten(std::int64_t slot, std::int32_t length) {
    for (std::int64_t layer = 0; layer < num_layers_; ++layer) {
      std::int32_t& tokens = Written(slot)[layer];
      tokens = std::min(tokens, length);
    }
  }
  // Marks tokens below `end` as written in every layer.
  void RaiseWritten(std::int64_t slot, std::int32_t end) {
    for (std::int64_t layer = 0; layer < num_layers_; ++layer) {
      std::int32_t& tokens = Written(slot)[layer];
      tokens = std::max(tokens, end);
    }
  }
  // Called when the slot gets a new occupant.
  void Reset(std::int64_t slot) {
    slots[slot].length = slots[slot].shared = slots[slot].dropped = 0;
    slots[slot].started = slots[slot].vacated = false;
    LowerWritten(slot, 0);
  }
  // A generation starts at the current epoch, so older caches may not read the slot. Tokens beyond its length may be
  // incompletely written, so they do not count.
  void StartGeneration(std::int64_t slot) {
    slots[slot].since = epoch;
    LowerWritten(slot, slots[slot].length);
  }

  // Records that an op with a cache of generation `of` has failed. Returns false if its program must fail.
  bool Keep(std::int32_t of, const Status& failed) {
    if (faults == nullptr) return false;
    if (of == generation && fault.ok()) fault = failed;
    faults->Add(device, failed, of == generation);
    return true;
  }
  // Called when a new generation starts without a fault.
  void ForgetFault() {
    fault = Status();
    if (faults != nullptr) faults->StartGeneration(device);
  }

  std::uint32_t NextEpoch() {
    ++epoch;
    if (MustRaiseStaleMarks(epoch)) {
      for (SlotProgress& slot : slots) RaiseStaleMark(epoch, &slot.since);
    }
    return epoch;
  }

  std::int32_t generation = 0;  // that programs must have
  std::uint32_t epoch = 0;
  std::int32_t running = 0;              // number of running handlers
  std::shared_ptr<SharedFaults> faults;  // shared by all devices of a mesh; null: a failing op fails its program
  std::size_t device = 0;                // index of this device in `faults`
  Status fault;                          // first fault of this generation; every later op fails with it
  std::vector<SlotProgress> slots;       // [max_slots]
  // [max_slots, num_layers]: the limit of reads, so recycled memory never shows another request's data.
  std::vector<std::int32_t> written;

 private:
  std::int64_t num_layers_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_DEVICE_PROGRESS_H_
