// CudaTransit: a device's memory on its way between processes, as descriptors of the driver's shareable handles.
//
// A descriptor gives whoever has it all of one allocation and nothing else, for reading and writing, and keeps the
// memory for as long as it is open. A block is one allocation, so it goes as a whole; what is sent of a block that
// stays somebody's is copied into a new allocation first. Copies are made in two reserved places of the address space,
// which belong to no block number.
#ifndef KVPAGE_VMM_CUDA_TRANSIT_H_
#define KVPAGE_VMM_CUDA_TRANSIT_H_

#include <atomic>
#include <cstdint>
#include <functional>

#include "base/fd.h"
#include "vmm/cuda_access.h"
#include "vmm/cuda_context.h"

namespace kvpage {

// The context is current in every call.
class CudaTransit {
 public:
  // `block_bytes` is the size of every allocation; `calls` counts the driver calls.
  CudaTransit(const CudaContext& context, CudaAccess* access, std::int64_t block_bytes,
              std::atomic<std::int64_t>* calls)
      : context_(context), access_(access), block_bytes_(block_bytes), calls_(calls) {}
  CudaTransit(const CudaTransit&) = delete;
  CudaTransit& operator=(const CudaTransit&) = delete;

  // A descriptor of an allocation that was made to be shared.
  Status Export(cu::MemHandle handle, Fd* out);
  // A handle of what another process has sent, which must be memory of this device. The descriptor stays the caller's.
  Status Import(int fd, cu::MemHandle* out);
  // A descriptor of a new allocation: it has the first `payload` bytes of a block, or of `image` in memory of the host
  // if there is one, and then zeros.
  Status ExportCopy(cu::MemHandle block, const char* image, std::int64_t payload, cu::Stream stream, Fd* out);
  // Copies what another process has sent into a block.
  Status CopyIn(int fd, cu::MemHandle block, cu::Stream stream);

  // The driver does not map what another process has sent.
  static Status WrongSize(std::int64_t block_bytes);

  // Unmaps and releases what a failed call has left in the places. Blocks may be released after a success only.
  Status Clear();
  // Clears the places and gives them back, where the driver lets it.
  void Free();

 private:
  static constexpr int kPlaces = 2;
  struct Place {
    bool mapped = false;
    cu::MemHandle owned = 0;  // released once nothing is mapped here; 0: what is mapped is a block's
  };

  Status Reserve();
  cu::DevicePtr Address(int place) const { return base_ + static_cast<cu::DevicePtr>(place * block_bytes_); }
  Status Map(int place, cu::MemHandle handle, bool read_only);
  Status Create(cu::MemHandle* out);
  // Does the work, waits for the stream, and clears the places.
  Status Run(cu::Stream stream, const std::function<Status()>& work);
  const Driver& driver() const { return context_.driver(); }
  void Count() { calls_->fetch_add(1, std::memory_order_relaxed); }

  const CudaContext& context_;
  CudaAccess* const access_;
  const std::int64_t block_bytes_;
  std::atomic<std::int64_t>* const calls_;
  cu::DevicePtr base_ = 0;  // 0: nobody has needed the places yet
  Place places_[kPlaces];
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_CUDA_TRANSIT_H_
