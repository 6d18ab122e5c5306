// CudaVmm: virtual memory slots on a CUDA device. One handle per block; cuMemMap places it.
//
// cuMemUnmap must unmap exactly the ranges that cuMemMap mapped, so every block is mapped separately; access is granted
// once per call of Map. The block window (cuda_window.h) needs one more mapping per block, and exists only once it was
// requested. New memory is uninitialized. Calls are synchronous and need no stream; the caller must not unmap memory
// that running programs may access.
#ifndef KVPAGE_VMM_CUDA_VMM_H_
#define KVPAGE_VMM_CUDA_VMM_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "vmm/cuda_access.h"
#include "vmm/cuda_context.h"
#include "vmm/cuda_transit.h"
#include "vmm/cuda_window.h"
#include "vmm/lent_blocks.h"
#include "vmm/vmm.h"

namespace kvpage {

class CudaVmm final : public Vmm {
 public:
  // Reserves `virtual_bytes` of the device's address space. `block_bytes` is a multiple of the driver's granularity.
  static Status Make(std::shared_ptr<const CudaContext> context, std::int64_t virtual_bytes, std::int64_t block_bytes,
                     std::unique_ptr<CudaVmm>* out);
  ~CudaVmm() override;
  CudaVmm(const CudaVmm&) = delete;
  CudaVmm& operator=(const CudaVmm&) = delete;

  // A device address.
  char* base() const override { return reinterpret_cast<char*>(base_); }
  // Has room for all of the device's memory, so it never moves.
  Status Window(char** out) override;
  Status Grow(std::int64_t num_blocks) override;
  Status Create(const std::int32_t* blocks, std::int64_t count) override;
  Status Destroy(const std::int32_t* blocks, std::int64_t count) override;
  Status Map(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) override;
  // Keeps blocks that are already mapped there.
  Status MapReadOnly(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) override;
  // No program may use a block that changes meanwhile: the driver maps only over holes.
  Status Remap(std::int64_t offset, const std::int32_t* old_blocks, const std::int32_t* blocks,
               std::int64_t count) override;
  Status Copy(const std::int32_t* from, const std::int32_t* to, std::int64_t count) override;
  Status Unmap(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) override;
  Status Mover(std::shared_ptr<BlockMover>* out) override;
  Status Fill(std::int64_t offset, std::int64_t bytes, int byte) override;
  void Abandon() override { abandoned_ = true; }
  std::int64_t PhysicalBytes() const override {
    return (num_handles_ - static_cast<std::int64_t>(received_.size())) * block_bytes_;
  }
  std::int64_t system_calls() const override { return system_calls_.load(std::memory_order_relaxed); }

  // ---- handed-over blocks (cuda_lent.cc) ----
  // The file contains no blocks: each block is a separate allocation, and lent_ records which file it belongs to.
  Status Lend(const std::shared_ptr<MemoryFile>& file, const std::int32_t* blocks, const std::int64_t* offsets,
              std::int64_t count) override;
  void Return(std::int32_t block) override;
  std::int64_t LentOffset(const MemoryFile& file, std::int32_t block) const override {
    return lent_.Offset(file, block);
  }
  std::int64_t NumLent(const MemoryFile& file) const override { return lent_.Count(file); }
  Status Seal(const std::shared_ptr<MemoryFile>& file) override;
  bool shares_handles() const override { return true; }
  Status MemoryName(std::string* out) override;
  Status Export(const std::int32_t* blocks, std::int64_t count, std::vector<Fd>* out) override;
  Status ExportCopies(const std::vector<CopySource>& blocks, std::int64_t payload, std::vector<Fd>* out) override;
  Status Import(const std::vector<int>& descriptors, const std::int32_t* blocks) override;
  Status ImportCopies(const std::vector<int>& descriptors, const std::int32_t* blocks) override;

  // Whether the handles can be exported to other processes.
  bool shareable() const { return handle_type_ != cu::HandleType::kNone; }

 private:
  CudaVmm(std::shared_ptr<const CudaContext> context, std::int64_t block_bytes, std::int64_t device_bytes);
  const Driver& driver() const { return context_->driver(); }
  cu::DevicePtr Address(std::int64_t place) const { return base_ + static_cast<cu::DevicePtr>(place * block_bytes_); }
  void Count(std::int64_t calls = 1) { system_calls_.fetch_add(calls, std::memory_order_relaxed); }

  Status CreateOne(std::int32_t block);
  Status ReleaseOne(std::int32_t block);
  Status MapOne(std::int64_t place, std::int32_t block);
  Status UnmapOne(std::int64_t place);
  // Grants access to mapped blocks, starting at a place; read-only where read_only_ is set.
  Status SetAccess(std::int64_t place, std::int64_t count);
  bool IsMapped(std::int64_t place, const std::int32_t* blocks, std::int64_t count) const;
  // Whether the block's memory must not be used for anything else.
  bool given(std::int32_t block) const { return lent_.Find(block) != nullptr || received_.count(block) > 0; }
  Status NotShareable() const;
  // Updates access to these blocks wherever they are mapped.
  Status Protect(const std::vector<std::int32_t>& blocks);
  Status CopyOne(std::int32_t from, std::int32_t to);
  Status MapRun(std::int64_t place, const std::int32_t* blocks, std::int64_t count);

  const std::shared_ptr<const CudaContext> context_;
  const std::int64_t block_bytes_;
  const std::int64_t device_bytes_;
  cu::HandleType handle_type_ = cu::HandleType::kNone;
  cu::DevicePtr base_ = 0;
  std::int64_t reserved_bytes_ = 0;
  cu::Stream stream_ = nullptr;         // for Fill and Copy
  std::vector<cu::MemHandle> handles_;  // [blocks]; valid where exists_
  std::vector<bool> exists_;            // [blocks]
  std::vector<std::int32_t> places_;    // [blocks] how many places it is mapped at
  std::vector<std::int32_t> mapped_;    // [places] block mapped at this place, or -1; the last two are for Copy
  std::int64_t num_handles_ = 0;
  bool abandoned_ = false;
  std::atomic<std::int64_t> system_calls_{0};
  CudaAccess access_;
  CudaWindow window_;
  CudaTransit transit_;
  LentBlocks lent_;                            // blocks of slots that may be, or were, handed over
  std::unordered_set<std::int32_t> received_;  // blocks whose memory was created by another pool
  std::vector<bool> read_only_;                // [blocks] handed over or received
  std::shared_ptr<BlockMover> mover_;          // null: not requested yet
  bool window_given_ = false;                  // a caller has the address, so it stays until destruction
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_CUDA_VMM_H_
