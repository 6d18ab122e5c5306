// Owners of memory that the driver allocates: on the device, and pinned on the host where kernels can write it.
#ifndef KVPAGE_DEVICE_MEMORY_H_
#define KVPAGE_DEVICE_MEMORY_H_

#include <cstddef>
#include <memory>
#include <string>
#include <utility>

#include "base/status.h"
#include "vmm/cuda_context.h"

namespace kvpage {

class DeviceMemory {
 public:
  DeviceMemory() = default;
  ~DeviceMemory() { Free(); }
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;

  // `what` is used in error messages, for example "of the table of pools".
  static Status Make(std::shared_ptr<const CudaContext> context, std::size_t bytes, const std::string& what,
                     DeviceMemory* out);
  cu::DevicePtr address() const { return address_; }
  // Gives up the memory without freeing it, because something may still use it.
  void Abandon() { address_ = 0; }

 private:
  void Free();

  std::shared_ptr<const CudaContext> context_;
  cu::DevicePtr address_ = 0;
};

class PinnedMemory {
 public:
  PinnedMemory() = default;
  ~PinnedMemory() { Free(); }
  PinnedMemory(PinnedMemory&& other) noexcept { *this = std::move(other); }
  PinnedMemory& operator=(PinnedMemory&& other) noexcept;

  // The memory is zero-filled.
  static Status Make(std::shared_ptr<const CudaContext> context, std::size_t bytes, const std::string& what,
                     PinnedMemory* out);
  char* data() const { return data_; }
  std::size_t size() const { return size_; }
  // The device address of `host`, which must point into this memory.
  template <class T>
  T* OnDevice(T* host) const {
    return reinterpret_cast<T*>(address_ +
                                static_cast<cu::DevicePtr>(reinterpret_cast<const volatile char*>(host) - data_));
  }
  void Abandon() { data_ = nullptr; }

 private:
  void Free();

  std::shared_ptr<const CudaContext> context_;
  char* data_ = nullptr;
  std::size_t size_ = 0;
  cu::DevicePtr address_ = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_DEVICE_MEMORY_H_
