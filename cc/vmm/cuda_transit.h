// CudaTransit: moves device memory between processes as descriptors of the driver's shareable handles.
//
// A descriptor gives its holder read and write access to exactly one allocation, and keeps the memory alive while it is
// open. A block is one allocation, so it is sent as a whole; blocks that stay in use by the sender are first copied
// into a new allocation. Copies go through two reserved places in the address space that belong to no block number.
#ifndef KVPAGE_VMM_CUDA_TRANSIT_H_
#define KVPAGE_VMM_CUDA_TRANSIT_H_

#include <atomic>
#include <cstdint>
#include <functional>

#include "base/fd.h"
#include "vmm/cuda_access.h"
#include "vmm/cuda_context.h"

namespace kvpage {

// The context must be current in every call.
class CudaTransit {
 public:
  // `block_bytes` is the size of every allocation; `calls` counts the driver calls.
  CudaTransit(const CudaContext& context, CudaAccess* access, std::int64_t block_bytes,
              std::atomic<std::int64_t>* calls)
      : context_(context), access_(access), block_bytes_(block_bytes), calls_(calls) {}
  CudaTransit(const CudaTransit&) = delete;
  CudaTransit& operator=(const CudaTransit&) = delete;

  // Exports a descriptor of an allocation that was created shareable.
  Status Export(cu::MemHandle handle, Fd* out);
  // Imports memory sent by another process, which must be on this device. The caller keeps ownership of the descriptor.
  Status Import(int fd, cu::MemHandle* out);
  // Exports a descriptor of a new allocation with the first `payload` bytes of a block, or of the host buffer `image`
  // if not null, followed by zeros.
  Status ExportCopy(cu::MemHandle block, const char* image, std::int64_t payload, cu::Stream stream, Fd* out);
  // Copies memory sent by another process into a block.
  Status CopyIn(int fd, cu::MemHandle block, cu::Stream stream);

  // The error for received memory that the driver does not map.
  static Status WrongSize(std::int64_t block_bytes);

  // Unmaps and releases what a failed call left in the places. Blocks may only be released after this succeeds.
  Status Clear();
  // Clears the places and frees their addresses, if the driver permits it.
  void Free();

 private:
  static constexpr int kPlaces = 2;
  struct Place {
    bool mapped = false;
    cu::MemHandle owned = 0;  // released after unmapping; 0: the mapped memory belongs to a block
  };

  Status Reserve();
  cu::DevicePtr Address(int place) const { return base_ + static_cast<cu::DevicePtr>(place * block_bytes_); }
  Status Map(int place, cu::MemHandle handle, bool read_only);
  Status Create(cu::MemHandle* out);
  // Runs `work`, waits for the stream, and clears the places.
  Status Run(cu::Stream stream, const std::function<Status()>& work);
  const Driver& driver() const { return context_.driver(); }
  void Count() { calls_->fetch_add(1, std::memory_order_relaxed); }

  const CudaContext& context_;
  CudaAccess* const access_;
  const std::int64_t block_bytes_;
  std::atomic<std::int64_t>* const calls_;
  cu::DevicePtr base_ = 0;  // 0: the places have not been needed yet
  Place places_[kPlaces];
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_CUDA_TRANSIT_H_
