#include "device/memory.h"

#include <cstring>

namespace kvpage {

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(context_, other.context_);
  std::swap(address_, other.address_);
  return *this;
}

Status DeviceMemory::Make(std::shared_ptr<const CudaContext> context, std::size_t bytes, const std::string& what,
                          DeviceMemory* out) {
  const ContextScope scope(*context);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  const Driver& driver = context->driver();
  DeviceMemory memory;
  KVPAGE_CU(driver, MemAlloc, std::to_string(bytes) + " bytes " + what, &memory.address_, bytes);
  memory.context_ = std::move(context);
  *out = std::move(memory);
  return {};
}

void DeviceMemory::Free() {
  if (address_ == 0) return;
  const ContextScope scope(*context_);
  if (scope.status().ok()) static_cast<void>(context_->driver().MemFree(address_));
  address_ = 0;
}

PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  std::swap(context_, other.context_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(address_, other.address_);
  return *this;
}

Status PinnedMemory::Make(std::shared_ptr<const CudaContext> context, std::size_t bytes, const std::string& what,
                          PinnedMemory* out) {
  const ContextScope scope(*context);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  const Driver& driver = context->driver();
  void* data = nullptr;
  KVPAGE_CU(driver, MemHostAlloc, std::to_string(bytes) + " bytes " + what, &data, bytes,
            cu::kHostAllocPortable | cu::kHostAllocDeviceMap);
  PinnedMemory memory;
  memory.context_ = std::move(context);
  memory.data_ = static_cast<char*>(data);
  memory.size_ = bytes;
  std::memset(data, 0, bytes);
  KVPAGE_CU(driver, MemHostGetDevicePointer, what, &memory.address_, data, 0);
  *out = std::move(memory);
  return {};
}

void PinnedMemory::Free() {
  if (data_ == nullptr) return;
  const ContextScope scope(*context_);
  if (scope.status().ok()) static_cast<void>(context_->driver().MemFreeHost(data_));
  data_ = nullptr;
}

}  // namespace kvpage
