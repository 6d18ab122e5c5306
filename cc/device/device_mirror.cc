#include "device/device_mirror.h"

#include <algorithm>
#include <cstddef>
#include <memory>

#include "base/epoch.h"
#include "cache/messages.h"
#include "device/fault.h"

namespace kvpage {
namespace {

// Carves arrays out of one allocation, each starting on its own cache line.
class Carver {
 public:
  template <class T>
  std::size_t Take(std::int64_t count) {
    const std::size_t at = size_;
    size_ = (size_ + static_cast<std::size_t>(count) * sizeof(T) + 127) / 128 * 128;
    return at;
  }
  std::size_t size() const { return size_; }

 private:
  std::size_t size_ = 0;
};

}  // namespace

Status DeviceMirror::Make(std::shared_ptr<DeviceState> device, const Geometry& geometry, char* base,
                          const PoolOptions& options, std::unique_ptr<DeviceMirror>* out) {
  std::unique_ptr<DeviceMirror> mirror(new DeviceMirror(std::move(device), geometry));
  KVPAGE_RETURN_IF_ERROR(mirror->Allocate(base, options));
  *out = std::move(mirror);
  return {};
}

Status DeviceMirror::Allocate(char* base, const PoolOptions& options) {
  const std::int64_t slots = geometry_.max_slots;
  const std::int64_t rows = slots * geometry_.num_layers;
  Carver on_device;
  on_device.Take<DeviceSlot>(slots);
  const std::size_t written = on_device.Take<std::int32_t>(rows);
  const std::size_t marks = on_device.Take<std::uint32_t>(slots);
  Carver on_host;
  on_host.Take<DevicePool>(1);
  const std::size_t fault = on_host.Take<Fault>(1);
  const std::size_t vacated = on_host.Take<std::uint32_t>(slots);
  const std::size_t rooms = on_host.Take<std::int32_t>(slots);
  const std::size_t slot_image = on_host.Take<DeviceSlot>(slots);
  const std::size_t written_image = on_host.Take<std::int32_t>(rows);
  KVPAGE_RETURN_IF_ERROR(DeviceMemory::Make(device_->context(), on_device.size(), "for a slot table", &memory_));
  KVPAGE_RETURN_IF_ERROR(PinnedMemory::Make(device_->context(), on_host.size(), "for a slot table", &pinned_));
  char* const host = pinned_.data();
  image_ = new (host) DevicePool;
  fault_ = new (host + fault) Fault;
  vacated_ = reinterpret_cast<std::uint32_t*>(host + vacated);
  new_rooms_ = reinterpret_cast<std::int32_t*>(host + rooms);
  slots_ = reinterpret_cast<DeviceSlot*>(host + slot_image);
  written_ = reinterpret_cast<std::int32_t*>(host + written_image);

  const SpecInts spec = geometry_.spec();
  std::copy(spec.begin(), spec.end(), image_->spec);
  image_->allow_stale = options.allow_stale ? 1 : 0;
  image_->debug = options.debug ? 1 : 0;
  image_->view = geometry_.View(base);
  image_->slots = reinterpret_cast<DeviceSlot*>(memory_.address());
  image_->written = reinterpret_cast<std::int32_t*>(memory_.address() + written);
  image_->marks = reinterpret_cast<std::uint32_t*>(memory_.address() + marks);
  image_->fault = pinned_.OnDevice(fault_);
  image_->vacated = pinned_.OnDevice(vacated_);
  // No slot has been acquired yet.
  for (std::int64_t slot = 0; slot < slots; ++slot) slots_[slot] = {0, 0, 0, /*released=*/1, 0, 0};
  return device_->Transfer({{Copy::kZero, memory_.address(), nullptr, on_device.size()}, SlotsCopy(Copy::kToDevice)});
}

Status DeviceMirror::Open(std::int32_t id) {
  image_->id = id;
  image_->open = 1;
  return device_->AddEntry(image_, &entry_);
}

Status DeviceMirror::SetRoom(const std::vector<Room>& rooms) {
  std::vector<Copy> copies;
  // Blocks first, in stream order: a kernel that sees the room also sees its blocks.
  for (const Room& room : rooms) {
    if (table_ != nullptr) table_->Update(room.slot, &copies);
  }
  const auto first_room = static_cast<std::ptrdiff_t>(copies.size());
  for (const Room& room : rooms) {
    if (rooms_[room.slot] == room.tokens) continue;
    new_rooms_[room.slot] = room.tokens;
    copies.push_back(NewRoomCopy(room.slot, offsetof(DeviceSlot, room)));
  }
  if (copies.empty()) return {};
  Status status = device_->Transfer(copies);
  if (table_ != nullptr) table_->Arrived(status.ok());
  if (!status.ok()) {
    // Some copies may have arrived. Restore the old rooms, because the caller will unmap the new blocks. Block numbers
    // beyond the rooms are not read.
    for (const Room& room : rooms) new_rooms_[room.slot] = std::max(rooms_[room.slot], 0);
    copies.erase(copies.begin(), copies.begin() + first_room);
    static_cast<void>(device_->Transfer(copies));
    return status;
  }
  for (const Room& room : rooms) rooms_[room.slot] = room.tokens;
  return {};
}

Status DeviceMirror::StopReaders(const std::vector<Room>& ends) {
  std::vector<Copy> copies;
  for (const Room& end : ends) {
    rooms_[end.slot] = -1;
    new_rooms_[end.slot] = end.tokens;
    copies.push_back(NewRoomCopy(end.slot, offsetof(DeviceSlot, room)));
  }
  KVPAGE_RETURN_IF_ERROR(device_->Transfer(copies));
  return WaitForReaders();
}

Status DeviceMirror::ReadMarks(std::int32_t slot, SlotMarks* out) {
  KVPAGE_RETURN_IF_ERROR(WaitForReaders());
  KVPAGE_RETURN_IF_ERROR(device_->Transfer({SlotsCopy(Copy::kToHost), WrittenCopy(Copy::kToHost)}));
  const std::int32_t* const layers = written_ + slot * geometry_.num_layers;
  *out = {*std::min_element(layers, layers + geometry_.num_layers), slots_[slot].shared};
  return {};
}

Status DeviceMirror::SetShared(std::int32_t slot, std::int32_t tokens) {
  new_rooms_[slot] = tokens;
  return device_->Transfer({NewRoomCopy(slot, offsetof(DeviceSlot, shared))});
}

Status DeviceMirror::CheckDrop(const std::vector<Room>& begins, const CacheRef& cache) {
  static const char* const kOp = "drop_before";
  if (cache.generation != image_->generation) {
    return messages::OtherGeneration(kOp, image_->id, cache.generation, image_->generation);
  }
  Copy epoch = FieldCopy(&DevicePool::epoch);
  epoch.kind = Copy::kToHost;
  KVPAGE_RETURN_IF_ERROR(device_->Transfer({epoch, SlotsCopy(Copy::kToHost)}));
  const bool stale = image_->allow_stale == 0 && cache.epoch != image_->epoch;
  if (stale || Before(image_->epoch, cache.epoch)) {
    return messages::StaleEpoch(kOp, image_->id, cache.epoch, image_->epoch);
  }
  for (const Room& begin : begins) {
    const DeviceSlot& slot = slots_[begin.slot];
    if (Before(cache.epoch, slot.since)) return messages::StaleSlot(kOp, begin.slot, cache.epoch, slot.since);
    if (begin.tokens > slot.length) return messages::DropBeyond(kOp, begin.slot, begin.tokens, slot.length);
  }
  return {};
}

Status DeviceMirror::Drop(const std::vector<Room>& begins, const CacheRef& cache) {
  KVPAGE_RETURN_IF_ERROR(CheckDrop(begins, cache));
  std::vector<Copy> copies;
  std::vector<std::int32_t> before;
  for (const Room& begin : begins) {
    before.push_back(slots_[begin.slot].dropped);
    new_rooms_[begin.slot] = begin.tokens;
    copies.push_back(NewRoomCopy(begin.slot, offsetof(DeviceSlot, dropped)));
  }
  // If the driver fails, some slots may be refused more than necessary, but nothing is unmapped.
  KVPAGE_RETURN_IF_ERROR(device_->Transfer(copies));
  KVPAGE_RETURN_IF_ERROR(WaitForReaders());
  // Check again: another thread's program may have run in between. No later program can shorten the slots further.
  Status status = CheckDrop(begins, cache);
  if (status.ok()) return status;
  for (std::size_t i = 0; i < begins.size(); ++i) new_rooms_[begins[i].slot] = before[i];
  static_cast<void>(device_->Transfer(copies));
  return status;
}

Status DeviceMirror::OpenTable(char* window, const BlockTable* table) {
  if (table_ != nullptr) return {};
  std::unique_ptr<BlockTableMirror> copy;
  KVPAGE_RETURN_IF_ERROR(BlockTableMirror::Make(device_.get(), geometry_, table, &copy));
  image_->table_view = copy->View(window);
  image_->table_layer_stride = copy->layer_stride();
  if (entry_ >= 0) {
    const Status status =
        PublishPointer(&DevicePool::table_view, &KVView::table, {FieldCopy(&DevicePool::table_layer_stride)});
    if (!status.ok()) {
      // Whatever has arrived must not be used, because the memory is freed.
      image_->table_view = {};
      static_cast<void>(device_->Transfer({FieldCopy(&DevicePool::table_view)}));
      return status;
    }
  }
  table_ = std::move(copy);
  return {};
}

Status DeviceMirror::ExtendRun(std::int32_t slot, std::int64_t begin, const std::int32_t* blocks, std::int64_t count) {
  if (entry_ < 0) return FailedPrecondition("the pool is not open on the device");
  if (runs_ == nullptr) {
    std::unique_ptr<RunMirror> runs;
    KVPAGE_RETURN_IF_ERROR(RunMirror::Make(device_.get(), geometry_, &runs));
    image_->runs = runs->View();
    runs_ = std::move(runs);  // even if the copy fails, kernels may see part of it
    runs_told_ = false;
  }
  if (!runs_told_) {
    KVPAGE_RETURN_IF_ERROR(PublishPointer(&DevicePool::runs, &DeviceRuns::blocks, {}));
    runs_told_ = true;
  }
  return runs_->Extend(slot, begin, blocks, count);
}

Status DeviceMirror::CutRun(std::int32_t slot, std::int64_t blocks) {
  if (runs_ == nullptr || !runs_->IsLonger(slot, blocks)) return {};
  ++image_->run_cuts;
  return runs_->Cut(slot, blocks, FieldCopy(&DevicePool::run_cuts));
}

std::int32_t DeviceMirror::Vacated(std::int32_t slot) {
  return static_cast<std::int32_t>(__atomic_load_n(&vacated_[slot], __ATOMIC_ACQUIRE)) - 1;
}

void DeviceMirror::ClearVacated(std::int32_t slot) { __atomic_store_n(&vacated_[slot], 0u, __ATOMIC_RELEASE); }

Status DeviceMirror::TakeFault() {
  Fault fault;
  if (entry_ >= 0 && device_->TakeFault(fault_, entry_, &fault)) {
    return DescribeFault(fault, image_->id, geometry_.spec());
  }
  if (device_->TakeUnownedFault(&fault)) return DescribeFault(fault, -1, {});
  return {};
}

std::string DeviceMirror::TakeWarning() {
  if (!device_->TakeManyStreams()) return "";
  return "ops of jax_kvpage run on several compute streams of one CUDA device: a release waits only for the work on "
         "its own stream, so programs on another stream may read a slot that already has a new owner. Queue all "
         "programs of a pool on one stream";
}

Status DeviceMirror::Counted(const Status& status, bool waited) {
  if (waited) waits_.fetch_add(1, std::memory_order_relaxed);
  return status;
}

Status DeviceMirror::WaitForReaders() {
  bool waited = false;
  const Status status = device_->WaitForReaders(entry_, &waited);
  return Counted(status, waited);
}

Status DeviceMirror::StartGeneration(std::int32_t generation, DeviceProgress* progress) {
  image_->generation = generation;
  KVPAGE_RETURN_IF_ERROR(device_->Transfer({FieldCopy(&DevicePool::generation)}));
  KVPAGE_RETURN_IF_ERROR(WaitForReaders());
  Copy epoch = FieldCopy(&DevicePool::epoch);
  epoch.kind = Copy::kToHost;
  KVPAGE_RETURN_IF_ERROR(device_->Transfer({epoch, SlotsCopy(Copy::kToHost), WrittenCopy(Copy::kToHost)}));
  progress->generation = generation;
  progress->epoch = image_->epoch;
  for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) {
    progress->slots[slot].length = slots_[slot].length;
    progress->slots[slot].since = slots_[slot].since;
    progress->slots[slot].shared = slots_[slot].shared;
    progress->slots[slot].dropped = slots_[slot].dropped;
    progress->slots[slot].vacated = slots_[slot].released != 0;
  }
  std::copy_n(written_, progress->written.size(), progress->written.begin());
  return {};
}

Status DeviceMirror::SetGeneration(const DeviceProgress& progress) {
  image_->epoch = progress.epoch;
  for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) {
    const SlotProgress& row = progress.slots[slot];
    slots_[slot] = {std::max(rooms_[slot], 0), row.since, row.length, row.vacated ? 1 : 0, row.shared, row.dropped};
  }
  std::copy(progress.written.begin(), progress.written.end(), written_);
  return device_->Transfer({FieldCopy(&DevicePool::epoch), SlotsCopy(Copy::kToDevice), WrittenCopy(Copy::kToDevice)});
}

void DeviceMirror::Close() {
  image_->open = 0;
  if (entry_ < 0 || !device_->Transfer({FieldCopy(&DevicePool::open)}).ok()) return;
  static_cast<void>(WaitForReaders());  // Leave waits again before the memory is freed
}

bool DeviceMirror::Leave() {
  if (entry_ < 0) return true;
  bool waited = false;
  const Status status = device_->RemoveEntry(entry_, &waited);
  entry_ = -1;
  if (Counted(status, waited).ok()) return true;
  memory_.Abandon();
  pinned_.Abandon();
  if (table_ != nullptr) table_->Abandon();
  if (runs_ != nullptr) runs_->Abandon();
  return false;
}

}  // namespace kvpage
