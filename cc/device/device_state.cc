#include "device/device_state.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <thread>

#include "base/max_devices.h"

namespace kvpage {
namespace {

struct Devices {
  std::mutex mutex;
  std::vector<std::shared_ptr<DeviceState>> open;  // [kMaxDevices]
  std::atomic<DeviceState*> found[kMaxDevices] = {};
};

Devices& TheDevices() {
  static Devices* const devices = new Devices;
  return *devices;
}

}  // namespace

Status DeviceState::Make(const Driver& driver, int ordinal, std::shared_ptr<DeviceState>* out) {
  std::shared_ptr<CudaContext> context;
  KVPAGE_RETURN_IF_ERROR(CudaContext::Make(driver, ordinal, &context));
  std::shared_ptr<DeviceState> device(new DeviceState(std::move(context)));
  KVPAGE_RETURN_IF_ERROR(device->Start());
  *out = std::move(device);
  return {};
}

Status DeviceState::Start() {
  const std::size_t table_bytes = kDeviceTableEntries * sizeof(DevicePool);
  KVPAGE_RETURN_IF_ERROR(
      DeviceMemory::Make(context_, table_bytes + sizeof(std::uint32_t), "for the table of pools", &table_));
  KVPAGE_RETURN_IF_ERROR(
      PinnedMemory::Make(context_, 256 + kMaxDevicePools * sizeof(std::uint32_t), "for faults", &shared_));
  static_assert(sizeof(Fault) <= 128);
  fault_ = reinterpret_cast<Fault*>(shared_.data());
  zero_ = reinterpret_cast<std::uint32_t*>(shared_.data() + 128);
  left_ = reinterpret_cast<std::int32_t*>(shared_.data() + 192);
  *left_ = kLeftEntry;
  readers_ = reinterpret_cast<std::uint32_t*>(shared_.data() + 256);
  {
    const ContextScope scope(*context_);
    KVPAGE_RETURN_IF_ERROR(scope.status());
    KVPAGE_CU(driver(), StreamCreate, "for the table of pools", &stream_, cu::kStreamNonBlocking);
  }
  std::fill(std::begin(ids_), std::end(ids_), kEmptyEntry);
  PinnedMemory image;
  KVPAGE_RETURN_IF_ERROR(PinnedMemory::Make(context_, table_bytes, "for the table of pools", &image));
  DevicePool* entries = reinterpret_cast<DevicePool*>(image.data());
  std::uninitialized_fill_n(entries, kDeviceTableEntries, DevicePool());
  entries[kMaxDevicePools].fault = shared_.OnDevice(fault_);
  return Transfer({{Copy::kToDevice, table_.address(), entries, table_bytes}});
}

DeviceState::~DeviceState() {
  if (stream_ == nullptr) return;
  const ContextScope scope(*context_);
  if (scope.status().ok()) static_cast<void>(driver().StreamDestroy(stream_));
}

DeviceState::Queueing::Queueing(DeviceState* device, cu::Stream stream)
    : lock_(device->queue_mutex_), scope_(*device->context_) {
  if (scope_.status().ok() && stream != device->last_stream_) device->NoteStream(stream);
}

void DeviceState::NoteStream(cu::Stream stream) {
  auto capturing = cu::CaptureStatus::kNone;
  // A captured call runs when its graph is launched, on another stream.
  if (driver().StreamIsCapturing(stream, &capturing) != cu::Result::kSuccess || capturing != cu::CaptureStatus::kNone) {
    return;
  }
  unsigned long long id = 0;  // unlike its address, the id is never reused
  if (driver().StreamGetId(stream, &id) != cu::Result::kSuccess) return;
  last_stream_ = stream;
  const auto seen = std::find(stream_ids_.begin(), stream_ids_.end(), id);
  if (seen != stream_ids_.end()) {
    many_streams_ |= id != stream_ids_.back();
    stream_ids_.erase(seen);
  }
  stream_ids_.push_back(id);
}

bool DeviceState::TakeManyStreams() {
  const std::lock_guard<std::mutex> lock(queue_mutex_);
  if (!many_streams_ || many_told_) return false;
  many_told_ = true;
  return true;
}

Status DeviceState::Staging::Reserve(std::size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(device_->staging_mutex_);
    if (!device_->staging_.empty()) {
      memory_ = std::move(device_->staging_.back());
      device_->staging_.pop_back();
    }
  }
  if (memory_.size() >= bytes) return {};
  std::size_t size = 4096;
  while (size < bytes) size *= 2;
  return PinnedMemory::Make(device_->context_, size, "for map_slots", &memory_);
}

bool DeviceState::MayFindRuns(cu::Stream stream) const {
  if (runs_.load(std::memory_order_relaxed) > 1) return true;
  auto capturing = cu::CaptureStatus::kNone;
  return driver().StreamIsCapturing(stream, &capturing) != cu::Result::kSuccess ||
         capturing != cu::CaptureStatus::kNone;
}

DeviceState::Staging::~Staging() {
  if (memory_.data() == nullptr) return;
  const std::lock_guard<std::mutex> lock(device_->staging_mutex_);
  device_->staging_.push_back(std::move(memory_));
}

Status DeviceState::Synchronize(cu::Stream stream) {
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  KVPAGE_CU(driver(), StreamSynchronize, "for map_slots", stream);
  return {};
}

Status DeviceState::Upload(cu::DevicePtr to, const void* from, std::size_t bytes, cu::Stream stream) {
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  KVPAGE_CU(driver(), MemcpyHtoDAsync, "for map_slots", to, from, bytes, stream);
  KVPAGE_CU(driver(), StreamSynchronize, "for map_slots", stream);
  return {};
}

Status DeviceState::CopyOnDevice(cu::DevicePtr to, cu::DevicePtr from, std::size_t bytes, cu::Stream stream) {
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  KVPAGE_CU(driver(), MemcpyDtoDAsync, "for after", to, from, bytes, stream);
  return {};
}

Status DeviceState::Transfer(const std::vector<Copy>& copies) {
  const std::lock_guard<std::mutex> lock(stream_mutex_);
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  const auto queue = [&]() -> Status {
    for (const Copy& copy : copies) {
      const std::string what = std::to_string(copy.bytes) + " bytes of the table of pools";
      switch (copy.kind) {
        case Copy::kToDevice:
          KVPAGE_CU(driver(), MemcpyHtoDAsync, what, copy.device, copy.host, copy.bytes, stream_);
          break;
        case Copy::kToHost:
          KVPAGE_CU(driver(), MemcpyDtoHAsync, what, copy.host, copy.device, copy.bytes, stream_);
          break;
        case Copy::kZero:
          KVPAGE_CU(driver(), MemsetD8Async, what, copy.device, 0, copy.bytes, stream_);
          break;
      }
    }
    return {};
  };
  Status status = queue();
  // Wait even after an error: copies that were queued before it may still be reading their source.
  const cu::Result done = driver().StreamSynchronize(stream_);
  if (!status.ok() || done == cu::Result::kSuccess) return status;
  return driver().Explain(done, cu::Call::kStreamSynchronize, "for the table of pools");
}

Status DeviceState::WaitForReaders(std::int32_t entry, bool* waited) {
  using Clock = std::chrono::steady_clock;
  const auto until = Clock::now() + wait_limit_;
  std::chrono::microseconds pause{10};
  *waited = false;
  while (true) {
    KVPAGE_RETURN_IF_ERROR(
        Transfer({{Copy::kToHost, Field(entry, &DevicePool::readers), &readers_[entry], sizeof(readers_[entry])}}));
    if (readers_[entry] == 0) return {};
    *waited = true;
    if (Clock::now() >= until) {
      return Internal("programs on CUDA device " + std::to_string(context_->ordinal()) + " still use the pool after " +
                      std::to_string(wait_limit_.count()) +
                      " ms: the device has failed or is stopped, so the pool's memory is not freed");
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(2 * pause, std::chrono::microseconds{1000});
  }
}

Status DeviceState::AddEntry(DevicePool* image, std::int32_t* entry) {
  std::int32_t place = -1;
  {
    const std::lock_guard<std::mutex> lock(table_mutex_);
    for (std::int32_t i = 0; i < kMaxDevicePools && place < 0; ++i) {
      const std::int32_t candidate = (image->id % kMaxDevicePools + i) % kMaxDevicePools;
      if (ids_[candidate] < 0) place = candidate;
    }
    if (place < 0) {
      return ResourceExhausted("KVPool: CUDA device " + std::to_string(context_->ordinal()) + " has " +
                               std::to_string(kMaxDevicePools) +
                               " pools of this process, the most that are possible: close one");
    }
    ids_[place] = image->id;
  }
  // Everything except `readers`, which the device owns.
  Status status = Transfer(
      {{Copy::kToDevice, table_.address() + place * sizeof(DevicePool), image, offsetof(DevicePool, readers)}});
  if (!status.ok()) {
    bool waited = false;
    static_cast<void>(RemoveEntry(place, &waited));
    return status;
  }
  *entry = place;
  return {};
}

Status DeviceState::RemoveEntry(std::int32_t entry, bool* waited) {
  KVPAGE_RETURN_IF_ERROR(Transfer({{Copy::kToDevice, Field(entry, &DevicePool::id), left_, sizeof(*left_)}}));
  KVPAGE_RETURN_IF_ERROR(WaitForReaders(entry, waited));
  const std::lock_guard<std::mutex> lock(table_mutex_);
  ids_[entry] = kLeftEntry;
  return {};
}

bool DeviceState::TakeFault(Fault* record, std::int32_t entry, Fault* out) {
  if (__atomic_load_n(&record->set, __ATOMIC_ACQUIRE) == 0) return false;
  {
    const std::lock_guard<std::mutex> lock(table_mutex_);
    if (__atomic_load_n(&record->set, __ATOMIC_ACQUIRE) == 0) return false;  // another call took it
    *out = *record;
    __atomic_store_n(&record->set, 0u, __ATOMIC_RELEASE);
  }
  // The device records no other fault before this copy is done. If it fails, the next call finds this fault again.
  if (!Transfer({{Copy::kToDevice, Field(entry, &DevicePool::faulted), zero_, sizeof(*zero_)}}).ok()) {
    __atomic_store_n(&record->set, 1u, __ATOMIC_RELEASE);
  }
  return true;
}

Status OpenDevice(int ordinal, std::shared_ptr<DeviceState>* out) {
  const Driver* driver = nullptr;
  KVPAGE_RETURN_IF_ERROR(Driver::Open(&driver));
  if (ordinal < 0 || ordinal >= kMaxDevices) {
    return InvalidArgument("CUDA device " + std::to_string(ordinal) + " does not exist");
  }
  Devices& devices = TheDevices();
  const std::lock_guard<std::mutex> lock(devices.mutex);
  devices.open.resize(kMaxDevices);
  std::shared_ptr<DeviceState>& device = devices.open[ordinal];
  if (device == nullptr) {
    KVPAGE_RETURN_IF_ERROR(DeviceState::Make(*driver, ordinal, &device));
    devices.found[ordinal].store(device.get(), std::memory_order_release);
  }
  *out = device;
  return {};
}

DeviceState* FindDevice(int ordinal) {
  if (ordinal < 0 || ordinal >= kMaxDevices) return nullptr;
  return TheDevices().found[ordinal].load(std::memory_order_acquire);
}

}  // namespace kvpage
