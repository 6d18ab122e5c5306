// Mirror: a copy of the pool's table for programs that run on a device.
//
// On CPU the handlers call the pool (program_ops.h) and there is no mirror. On a device kernels check programs against
// a copy of the table in device memory; the pool tells the mirror what the host decided and learns from it what
// programs did. None of the calls waits for the device unless it says so. The mapping mutex serialises them, except
// Vacated, ClearVacated and TakeFault, which may come while another call waits.
//
// The destructor ends as Leave does.
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

  struct Room {  // where it ends, or begins
    std::int32_t slot = 0;
    std::int32_t tokens = 0;
  };
  // Tokens that may be written in these slots, visible to every program that is queued from now on. Memory beyond what
  // was said before is mapped by now; only StopReaders shrinks that of an occupied slot. Where the block table is open,
  // a program that sees the room also sees the current blocks of the slots.
  virtual Status SetRoom(const std::vector<Room>& rooms) = 0;

  // From now on programs may use nothing from `tokens` on in these slots: waits for those that passed their check
  // before. SetRoom ends that.
  virtual Status StopReaders(const std::vector<Room>& ends) = 0;

  // Waits for programs that passed their check earlier, then reads what they left: the number of tokens written in
  // every layer for the slot's occupant, and the number of leading positions that may no longer be written.
  struct SlotMarks {
    std::int32_t written = 0, shared = 0;
  };
  virtual Status ReadMarks(std::int32_t slot, SlotMarks* out) = 0;
  // Forbids programs to write below `tokens` in this slot, whose readers must be stopped.
  virtual Status SetShared(std::int32_t slot, std::int32_t tokens) = 0;

  // From now on programs may use nothing below `tokens` in these slots: waits for those that passed their check before.
  // Fails, and changes nothing, unless `cache` is the newest value and the slots have as many tokens on the device.
  virtual Status Drop(const std::vector<Room>& begins, const CacheRef& cache) = 0;

  // Gives the device a copy of the block table, for programs that address blocks by number; `window`: see Vmm::Window.
  // From now on SetRoom keeps it up to date. Nothing happens after the first success.
  virtual Status OpenTable(char* window, const BlockTable* table) = 0;

  // Other slots map the first blocks of this slot too (SharedRuns): blocks [begin, begin + count) of its run, after
  // those that it has. Only speed depends on it.
  virtual Status ExtendRun(std::int32_t slot, std::int64_t begin, const std::int32_t* blocks, std::int64_t count) = 0;
  // From block `blocks` on the slot's mappings are about to change. When it fails they must not. Programs that are
  // queued from now on share no more than is left.
  virtual Status CutRun(std::int32_t slot, std::int64_t blocks) = 0;

  // The device's number, as JAX counts them.
  virtual int device() const = 0;

  // Once the release of this slot has run, with everything that was queued before it: the tokens that its occupant had
  // written in every layer; -1 before. Cheap: asked on every call.
  virtual std::int32_t Vacated(std::int32_t slot) = 0;
  // The slot gets a new owner: forget that it was vacated.
  virtual void ClearVacated(std::int32_t slot) = 0;

  // The first fault of a program since the last call, as a status; ok when there was none.
  virtual Status TakeFault() = 0;

  // From now on programs of older generations fail their check; then waits until those that passed it are done and
  // reads the epoch, lengths, marks, written tokens and free slots that they left. When it fails, either generation may
  // be the one that programs must have; a later call settles it.
  virtual Status StartGeneration(std::int32_t generation, DeviceProgress* progress) = 0;
  // The new generation's state, before any of its programs is queued; `vacated` marks the slots that are free in it.
  virtual Status SetGeneration(const DeviceProgress& progress) = 0;

  // Programs fail from now on, naming the pool; waits until those that passed their check are done.
  virtual void Close() = 0;

  // Programs no longer find the pool; waits for those that did. False: the device does not answer, or they do not end
  // in time. They may still use the pool's memory, so it must stay mapped.
  virtual bool Leave() = 0;

  // Something about programs on this device that the user should know, once; empty: nothing.
  virtual std::string TakeWarning() = 0;

  // Times that a call here waited for the device.
  virtual std::int64_t waits() const = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_MIRROR_H_
