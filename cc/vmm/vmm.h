// Vmm: the virtual memory of a pool as a few operations (create, destroy, map, unmap, fill) on numbered blocks.
//
// Physical memory is an array of equal blocks, each of which has memory only between Create and Destroy; virtual memory
// is one reserved range. Higher layers (accounting, sharing, reclaim) are platform-independent and use only block
// numbers and byte offsets. Unmapped parts of the range are holes and cost no memory. With memfd they read as zeros; on
// a CUDA device they must not be accessed.
//
// Not thread-safe: the pool serialises calls. Other threads may read and write mapped addresses at any time.
#ifndef KVPAGE_VMM_VMM_H_
#define KVPAGE_VMM_VMM_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/fd.h"
#include "base/status.h"
#include "vmm/block_mover.h"

namespace kvpage {

class MemoryFile;

class Vmm {
 public:
  virtual ~Vmm() = default;

  // Start of the reserved virtual range.
  virtual char* base() const = 0;

  // Start of the block window: created block b is at b * block_bytes in it, for reading and writing, wherever else it
  // is mapped. Reserved by the first call. Grow extends it, after which it may start elsewhere, so call this again.
  // Earlier results stay valid for the blocks that existed then.
  virtual Status Window(char** out) = 0;

  // Makes block numbers below `num_blocks` valid. Never shrinks; Destroy frees memory.
  virtual Status Grow(std::int64_t num_blocks) = 0;

  // Allocates the physical memory of the blocks, so that later accesses cannot fail. All or none. With memfd it is
  // zero-filled; on a CUDA device it is uninitialized.
  virtual Status Create(const std::int32_t* blocks, std::int64_t count) = 0;
  // Frees the memory of unmapped blocks. After a failure a block keeps its memory; creating it again is harmless.
  virtual Status Destroy(const std::int32_t* blocks, std::int64_t count) = 0;

  // Maps created blocks consecutively, from `offset` bytes into the range, over a hole. All or none. The same block may
  // be mapped at several offsets.
  virtual Status Map(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) = 0;
  // Like Map, for blocks that are mapped for writing elsewhere. If the platform supports it, a write through this
  // mapping faults.
  virtual Status MapReadOnly(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) {
    return Map(offset, blocks, count);
  }
  // Replaces the blocks mapped from `offset` on by others, for writing. Other threads may read there meanwhile and see
  // one or the other. `old_blocks` as passed to Map. All or none.
  virtual Status Remap(std::int64_t offset, const std::int32_t* old_blocks, const std::int32_t* blocks,
                       std::int64_t count) = 0;
  // Replaces the block mapped at `offset` by one with the same contents, mapped for writing or for reading as before.
  // Other threads may read there meanwhile. All or nothing.
  virtual Status Exchange(std::int64_t offset, std::int32_t old_block, std::int32_t block, bool /*writable*/) {
    return Remap(offset, &old_block, &block, 1);
  }
  // Copies the contents of created blocks, from[i] to to[i]. Synchronous.
  virtual Status Copy(const std::int32_t* from, const std::int32_t* to, std::int64_t count) = 0;
  // Unmaps `count` blocks mapped from `offset` on, leaving a hole; `blocks` as passed to Map. All or none.
  virtual Status Unmap(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) = 0;
  // Moves `count` mapped blocks to another place, over a hole, and leaves a hole. All or none.
  virtual Status Move(std::int64_t from, std::int64_t to, const std::int32_t* blocks, std::int64_t count) {
    // The blocks stay mapped throughout, so the rollback cannot fail for lack of memory.
    KVPAGE_RETURN_IF_ERROR(Map(to, blocks, count));
    Status status = Unmap(from, blocks, count);
    if (!status.ok()) static_cast<void>(Unmap(to, blocks, count));
    return status;
  }
  // Size of a huge page, which a single page table entry maps if address and file offset agree modulo this size; 0 if
  // there are none, or if the reserved range is not aligned to it.
  virtual std::int64_t huge_page_bytes() const { return 0; }
  // Moves created blocks from `first` on, which fill complete huge pages of the file, into such pages. Other threads
  // may read and write there meanwhile. A failure changes nothing.
  virtual Status Collapse(std::int32_t /*first*/, std::int64_t /*count*/) {
    return {Code::kUnimplemented, "this memory has no huge pages"};
  }
  // Copies blocks to and from host memory; null if the host can access them directly. Created by the first call. It may
  // outlive the blocks, but its copies must not.
  virtual Status Mover(std::shared_ptr<BlockMover>* out) {
    out->reset();
    return {};
  }
  // Overwrites mapped memory with one byte value. Synchronous.
  virtual Status Fill(std::int64_t offset, std::int64_t bytes, int byte) = 0;

  // ---- blocks whose memory is in another file ----
  // Gives blocks that have no memory and are not mapped the memory of `file`, blocks[i] at offsets[i]. Such a block
  // must not be created or destroyed, but otherwise behaves like any other. If the file is not sealed, this part of it
  // is allocated first; if it is sealed, all mappings are read-only. All or none.
  virtual Status Lend(const std::shared_ptr<MemoryFile>& /*file*/, const std::int32_t* /*blocks*/,
                      const std::int64_t* /*offsets*/, std::int64_t /*count*/) {
    return {Code::kUnimplemented, "this memory cannot show blocks of other files"};
  }
  // Ends Lend for a block, which must be mapped only in the window. Its memory is freed if the file is not sealed.
  virtual void Return(std::int32_t /*block*/) {}
  // The offset of a block in a file, -1 if it is not in it; and the number of blocks in a file.
  virtual std::int64_t LentOffset(const MemoryFile& /*file*/, std::int32_t /*block*/) const { return -1; }
  virtual std::int64_t NumLent(const MemoryFile& /*file*/) const { return 0; }
  // Seals a file whose blocks are mapped read-only everywhere except in the window. All or nothing.
  virtual Status Seal(const std::shared_ptr<MemoryFile>& /*file*/) {
    return {Code::kUnimplemented, "this memory cannot be sealed"};
  }

  // ---- blocks handed over as handles, one descriptor per block ----
  // Whether this memory is handed over in this way. Then the file passed to Lend and Seal contains no blocks: it only
  // identifies the blocks of one sequence. Each of them is a separate allocation whose memory no other sequence has
  // used. Blocks of a sealed file are read-only, and Return releases the handle: the memory exists as long as another
  // process holds it.
  virtual bool shares_handles() const { return false; }
  // Identifies the device by its UUID, "GPU-...", so that a receiver can check that it uses the same one.
  virtual Status MemoryName(std::string* out) {
    out->clear();
    return {};
  }
  // Exports descriptors of created blocks.
  virtual Status Export(const std::int32_t* /*blocks*/, std::int64_t /*count*/, std::vector<Fd>* /*out*/) {
    return NoHandles();
  }
  // Exports descriptors of copies of blocks, in new memory that the pool does not keep: the first `payload` bytes of
  // each, followed by zeros.
  struct CopySource {
    std::int32_t block = 0;
    const char* image = nullptr;  // host memory to copy instead of the block's contents
  };
  virtual Status ExportCopies(const std::vector<CopySource>& /*blocks*/, std::int64_t /*payload*/,
                              std::vector<Fd>* /*out*/) {
    return NoHandles();
  }
  // Backs blocks without memory with the memory of the descriptors, read-only, until Return. All or nothing.
  virtual Status Import(const std::vector<int>& /*descriptors*/, const std::int32_t* /*blocks*/) { return NoHandles(); }
  // Copies the contents into created blocks instead.
  virtual Status ImportCopies(const std::vector<int>& /*descriptors*/, const std::int32_t* /*blocks*/) {
    return NoHandles();
  }

  // A device may still use the memory and cannot be stopped: the destructor must leave all of it mapped.
  virtual void Abandon() {}

  // Bytes allocated for the blocks, according to the system.
  virtual std::int64_t PhysicalBytes() const = 0;
  // System (or driver) calls made so far by the functions above.
  virtual std::int64_t system_calls() const = 0;

 private:
  static Status NoHandles() { return {Code::kUnimplemented, "this memory has no handles that could be shared"}; }
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_VMM_H_
