// DeviceMirror: the device-side copy of one pool's slot table.
//
// State that kernels change (slots, tokens written, marks) is in device memory. Their reports (faults, releases) are in
// pinned memory, which the host reads without a driver call. Changes by the host are small synchronous copies on a
// separate stream: programs queued afterwards see them.
#ifndef KVPAGE_DEVICE_DEVICE_MIRROR_H_
#define KVPAGE_DEVICE_DEVICE_MIRROR_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/device_table.h"
#include "cache/geometry.h"
#include "cache/mirror.h"
#include "cache/types.h"
#include "device/block_table_mirror.h"
#include "device/device_state.h"
#include "device/run_mirror.h"

namespace kvpage {

class DeviceMirror final : public Mirror {
 public:
  // `base`: device address of the pool's memory.
  static Status Make(std::shared_ptr<DeviceState> device, const Geometry& geometry, char* base,
                     const PoolOptions& options, std::unique_ptr<DeviceMirror>* out);
  ~DeviceMirror() override { Leave(); }
  DeviceMirror(const DeviceMirror&) = delete;
  DeviceMirror& operator=(const DeviceMirror&) = delete;

  Status Open(std::int32_t id) override;
  Status SetRoom(const std::vector<Room>& rooms) override;
  Status StopReaders(const std::vector<Room>& ends) override;
  Status ReadMarks(std::int32_t slot, SlotMarks* out) override;
  Status SetShared(std::int32_t slot, std::int32_t tokens) override;
  Status Drop(const std::vector<Room>& begins, const CacheRef& cache) override;
  Status OpenTable(char* window, const BlockTable* table) override;
  Status ExtendRun(std::int32_t slot, std::int64_t begin, const std::int32_t* blocks, std::int64_t count) override;
  Status CutRun(std::int32_t slot, std::int64_t blocks) override;
  int device() const override { return device_->context()->ordinal(); }
  std::int32_t Vacated(std::int32_t slot) override;
  void ClearVacated(std::int32_t slot) override;
  Status TakeFault() override;
  Status StartGeneration(std::int32_t generation, DeviceProgress* progress) override;
  Status SetGeneration(const DeviceProgress& progress) override;
  void Close() override;
  bool Leave() override;
  std::string TakeWarning() override;
  std::int64_t waits() const override { return waits_.load(std::memory_order_relaxed); }

  // Index in the device's table; -1 before Open.
  std::int32_t entry() const { return entry_; }

 private:
  using Copy = DeviceState::Copy;

  DeviceMirror(std::shared_ptr<DeviceState> device, const Geometry& geometry)
      : device_(std::move(device)), geometry_(geometry), rooms_(geometry.max_slots, 0) {}
  Status Allocate(char* base, const PoolOptions& options);
  Status Counted(const Status& status, bool waited);
  Status WaitForReaders();
  // Reads the slots and checks whether programs with this cache could drop everything before these positions.
  Status CheckDrop(const std::vector<Room>& begins, const CacheRef& cache);
  template <class T>
  Copy FieldCopy(T DevicePool::* field) {
    return {Copy::kToDevice, device_->Field(entry_, field), &(image_->*field), sizeof(T)};
  }
  // Copies a struct that kernels use once a pointer in it is set: everything else first, with `before`, because kernels
  // run meanwhile and a copy of several words may arrive in pieces.
  template <class Struct, class Pointer>
  Status PublishPointer(Struct DevicePool::* field, Pointer Struct::* pointer, std::vector<Copy> before) {
    Pointer& place = image_->*field.*pointer;
    const Pointer value = std::exchange(place, nullptr);
    Copy copy = FieldCopy(field);
    before.push_back(copy);
    Status status = device_->Transfer(before);
    place = value;
    if (!status.ok()) return status;
    copy.device += static_cast<cu::DevicePtr>(reinterpret_cast<char*>(&place) - static_cast<char*>(copy.host));
    copy.host = static_cast<void*>(&place);
    copy.bytes = sizeof(place);
    return device_->Transfer({copy});
  }
  Copy SlotsCopy(Copy::Kind kind) { return {kind, slots_address(), slots_, geometry_.max_slots * sizeof(DeviceSlot)}; }
  Copy WrittenCopy(Copy::Kind kind) {
    return {kind, written_address(), written_, geometry_.max_slots * geometry_.num_layers * sizeof(std::int32_t)};
  }
  // Copies an element of new_rooms_ to a field of the slot's row.
  Copy NewRoomCopy(std::int32_t slot, std::size_t field) {
    const cu::DevicePtr row = slots_address() + static_cast<cu::DevicePtr>(slot) * sizeof(DeviceSlot);
    return {Copy::kToDevice, row + field, &new_rooms_[slot], sizeof(std::int32_t)};
  }
  cu::DevicePtr slots_address() const { return memory_.address(); }
  cu::DevicePtr written_address() const { return reinterpret_cast<cu::DevicePtr>(image_->written); }

  const std::shared_ptr<DeviceState> device_;
  const Geometry geometry_;
  DeviceMemory memory_;
  PinnedMemory pinned_;  // the members below point into it
  DevicePool* image_ = nullptr;
  Fault* fault_ = nullptr;
  std::uint32_t* vacated_ = nullptr;   // [max_slots]
  std::int32_t* new_rooms_ = nullptr;  // [max_slots]
  DeviceSlot* slots_ = nullptr;        // [max_slots]
  std::int32_t* written_ = nullptr;    // [max_slots, num_layers]
  std::vector<std::int32_t> rooms_;    // room on the device; -1: StopReaders has set another value, or has tried to
  std::unique_ptr<BlockTableMirror> table_;  // null until a program needs it
  std::unique_ptr<RunMirror> runs_;          // null until slots share something
  bool runs_told_ = false;                   // whether the pool's entry has their addresses
  std::int32_t entry_ = -1;
  std::atomic<std::int64_t> waits_{0};
};

}  // namespace kvpage

#endif  // KVPAGE_DEVICE_DEVICE_MIRROR_H_
