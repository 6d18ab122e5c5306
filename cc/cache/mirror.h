// Mirror: a copy of the pool's table for programs that run on a device.
//
// On CPU, handlers call the pool (program_ops.h) and there is no mirror. On a device, kernels check programs against a
// copy of the table in device memory; the pool tells the mirror what the host has decided, and learns from it what
// programs have done. Calls do not wait for the device unless their comment says so. The mapping mutex serialises them,
// except Vacated, ClearVacated and TakeFault, which may be called while another call waits.
//
// The destructor calls Leave.
#ifndef KVPAGE_CACHE_MIRROR_H_
#define KVPAGE_CACHE_MIRROR_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "cache/block_table.h"
#include "cache/device_progress.h"
#include "cache/types.h"

namespace kvpage {

class Mirror {
 public:
  virtual ~Mirror() = default;

  // Makes the pool findable by programs under this id.
  virtual Status Open(std::int32_t id) = 0;

  struct Room {  // where the room ends, or where it begins
    std::int32_t slot = 0;
    std::int32_t tokens = 0;
  };
  // Sets the number of tokens that may be written in these slots, for every program queued from now on. The memory must
  // already be mapped. Only StopReaders can shrink the room of an occupied slot. If the block table is open, a program
  // that sees the room also sees the current blocks of the slots.
  virtual Status SetRoom(const std::vector<Room>& rooms) = 0;

  // Forbids programs to use anything from `tokens` on in these slots, and waits for those that have already passed
  // their check. SetRoom ends this.
  virtual Status StopReaders(const std::vector<Room>& ends) = 0;

  // Waits for programs that passed their check earlier, then reads what they left: the number of tokens written in
  // every layer for the slot's occupant, and the number of leading positions that may no longer be written.
  struct SlotMarks {
    std::int32_t written = 0, shared = 0;
  };
  virtual Status ReadMarks(std::int32_t slot, SlotMarks* out) = 0;
  // Forbids programs to write below `tokens` in this slot, whose readers must be stopped.
  virtual Status SetShared(std::int32_t slot, std::int32_t tokens) = 0;

  // Forbids programs to use anything below `tokens` in these slots, and waits for those that have already passed their
  // check. Fails and changes nothing unless `cache` is the newest value and the slots have as many tokens on the
  // device.
  virtual Status Drop(const std::vector<Room>& begins, const CacheRef& cache) = 0;

  // Gives the device a copy of the block table, for programs that address blocks by number; for `window` see
  // Vmm::Window. SetRoom then keeps it up to date. Does nothing after the first success.
  virtual Status OpenTable(char* window, const BlockTable* table) = 0;

  // Extends a slot's run (SharedRuns) by blocks [begin, begin + count), which other slots map too. This only affects
  // speed.
  virtual Status ExtendRun(std::int32_t slot, std::int64_t begin, const std::int32_t* blocks, std::int64_t count) = 0;
  // Called before the slot's mappings change from block `blocks` on; they must not change if it fails. Programs queued
  // from now on share only what is left.
  virtual Status CutRun(std::int32_t slot, std::int64_t blocks) = 0;

  // The device's number in JAX.
  virtual int device() const = 0;

  // The number of tokens that the slot's occupant had written in every layer, once the slot's release and everything
  // queued before it have run; -1 before that. Cheap, because every host call asks.
  virtual std::int32_t Vacated(std::int32_t slot) = 0;
  // Called when the slot gets a new owner: forgets that it was vacated.
  virtual void ClearVacated(std::int32_t slot) = 0;

  // Returns the first fault of a program since the last call as a status; ok if there was none.
  virtual Status TakeFault() = 0;

  // Makes programs of older generations fail their check, waits until those that have passed it are done, and reads the
  // epoch, lengths, marks, written tokens and free slots that they left. If it fails, programs may need either
  // generation; a later call settles it.
  virtual Status StartGeneration(std::int32_t generation, DeviceProgress* progress) = 0;
  // Sets the state of the new generation before any of its programs is queued; `vacated` marks the slots that are free
  // in it.
  virtual Status SetGeneration(const DeviceProgress& progress) = 0;

  // Makes programs fail with an error that names the pool; waits until those that have passed their check are done.
  virtual void Close() = 0;

  // Makes the pool unfindable for programs and waits for those that have found it. Returns false if the device does not
  // respond or the programs do not end in time. They may then still use the pool's memory, so it must stay mapped.
  virtual bool Leave() = 0;

  // Returns a warning for the user about programs on this device, once; empty if there is none.
  virtual std::string TakeWarning() = 0;

  // Number of times that a call waited for the device.
  virtual std::int64_t waits() const = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_MIRROR_H_
