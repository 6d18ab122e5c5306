// CudaWindow: a reserved range of a device's address space in which every created block is mapped at its own number,
// for reading and writing, or read-only, in addition to its other mappings.
//
// Reserved once, for as many blocks as fit into the GPU's memory, so that it never moves. As in CudaVmm, every block is
// mapped separately, and access is granted once for each run of adjacent blocks.
#ifndef KVPAGE_VMM_CUDA_WINDOW_H_
#define KVPAGE_VMM_CUDA_WINDOW_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "vmm/cuda_access.h"
#include "vmm/cuda_context.h"

namespace kvpage {

// The context must be current in every call.
class CudaWindow {
 public:
  // Reserves nothing yet. `block_bytes` must be a multiple of the driver's granularity; `calls` counts the driver
  // calls.
  CudaWindow(const CudaContext& context, CudaAccess* access, std::int64_t block_bytes, std::atomic<std::int64_t>* calls)
      : context_(context), access_(access), block_bytes_(block_bytes), calls_(calls) {}
  CudaWindow(const CudaWindow&) = delete;
  CudaWindow& operator=(const CudaWindow&) = delete;

  // Reserves room for `blocks` blocks. Call once.
  Status Reserve(std::int64_t blocks);
  // Unmaps everything and frees the range. If a block cannot be unmapped, the range stays reserved.
  void Free();

  bool reserved() const { return base_ != 0; }
  char* base() const { return reinterpret_cast<char*>(base_); }
  std::int64_t capacity() const { return static_cast<std::int64_t>(states_.size()); }

  // Maps those blocks that are not mapped yet. handles[block] is the memory of a block; read_only[block]: whether it is
  // read-only. All or nothing.
  Status Map(const std::int32_t* blocks, std::int64_t count, const std::vector<cu::MemHandle>& handles,
             const std::vector<bool>& read_only);
  // Updates access to a block; does nothing if it is not mapped.
  Status Protect(std::int32_t block, bool read_only);
  // Unmaps a block; does nothing if it is not mapped.
  Status Unmap(std::int32_t block);

 private:
  // kMapped: a call could not grant access, and could not unmap the block again.
  enum class State : std::int8_t { kHole, kMapped, kAccessible };

  cu::DevicePtr Address(std::int64_t block) const { return base_ + static_cast<cu::DevicePtr>(block * block_bytes_); }
  Status MapOne(std::int32_t block, cu::MemHandle handle);
  // `blocks` must be sorted.
  Status Allow(const std::vector<std::int32_t>& blocks, const std::vector<bool>& read_only);
  void Count() { calls_->fetch_add(1, std::memory_order_relaxed); }

  const CudaContext& context_;
  CudaAccess* const access_;
  const std::int64_t block_bytes_;
  std::atomic<std::int64_t>* const calls_;
  cu::DevicePtr base_ = 0;
  std::vector<State> states_;  // [capacity]
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_CUDA_WINDOW_H_
