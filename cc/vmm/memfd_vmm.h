// MemfdVmm: virtual memory slots on CPU. One memfd holds all blocks, apart from those that are lent (memory_file.h);
// mmap(MAP_FIXED | MAP_SHARED) places them.
#ifndef KVPAGE_VMM_MEMFD_VMM_H_
#define KVPAGE_VMM_MEMFD_VMM_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "vmm/lent_blocks.h"
#include "vmm/vmm.h"

namespace kvpage {

// Length of the run of consecutive block numbers that starts at blocks[0].
inline std::int64_t BlockRun(const std::int32_t* blocks, std::int64_t count) {
  std::int64_t n = 1;
  while (n < count && blocks[n] == blocks[n - 1] + 1) ++n;
  return n;
}

class MemfdVmm final : public Vmm {
 public:
  // Reserves `virtual_bytes` of address space. `block_bytes` is a multiple of the page size.
  static Status Make(std::int64_t virtual_bytes, std::int64_t block_bytes, std::unique_ptr<MemfdVmm>* out);
  ~MemfdVmm() override;
  MemfdVmm(const MemfdVmm&) = delete;
  MemfdVmm& operator=(const MemfdVmm&) = delete;

  char* base() const override { return base_; }
  Status Window(char** out) override;
  Status Grow(std::int64_t num_blocks) override;
  Status Create(const std::int32_t* blocks, std::int64_t count) override;
  Status Destroy(const std::int32_t* blocks, std::int64_t count) override;
  Status Map(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) override;
  Status MapReadOnly(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) override;
  Status Remap(std::int64_t offset, const std::int32_t* old_blocks, const std::int32_t* blocks,
               std::int64_t count) override;
  Status Exchange(std::int64_t offset, std::int32_t old_block, std::int32_t block, bool writable) override;
  Status Copy(const std::int32_t* from, const std::int32_t* to, std::int64_t count) override;
  Status Unmap(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) override;
  // Moves the page table entries (mremap): 25 us for 4 MiB, compared with 900 us for unmapping and mapping again.
  Status Move(std::int64_t from, std::int64_t to, const std::int32_t* blocks, std::int64_t count) override;
  std::int64_t huge_page_bytes() const override;
  Status Collapse(std::int32_t first, std::int64_t count) override;
  Status Fill(std::int64_t offset, std::int64_t bytes, int byte) override;
  std::int64_t PhysicalBytes() const override;

  // ---- blocks in other files (memfd_lent.cc) ----
  Status Lend(const std::shared_ptr<MemoryFile>& file, const std::int32_t* blocks, const std::int64_t* offsets,
              std::int64_t count) override;
  void Return(std::int32_t block) override;
  std::int64_t LentOffset(const MemoryFile& file, std::int32_t block) const override {
    return lent_.Offset(file, block);
  }
  std::int64_t NumLent(const MemoryFile& file) const override { return lent_.Count(file); }
  Status Seal(const std::shared_ptr<MemoryFile>& file) override;

  std::int64_t system_calls() const override { return system_calls_.load(std::memory_order_relaxed); }

 private:
  MemfdVmm(char* base, std::int64_t virtual_bytes, std::int64_t block_bytes, int fd)
      : base_(base), virtual_bytes_(virtual_bytes), block_bytes_(block_bytes), fd_(fd) {}
  Status CheckHeadroom(std::int64_t bytes);
  Status MapRuns(std::int64_t offset, const std::int32_t* blocks, std::int64_t count, int protection, int flags);
  Status Hole(std::int64_t offset, std::int64_t bytes);
  Status ExtendWindow();
  // Where the first blocks are that one mapping can cover, and how to map them.
  struct Backing {
    std::int64_t run = 0;  // blocks
    int fd = -1;
    std::int64_t offset = 0;
    int protection = 0;
    int sharing = 0;
  };
  Backing Locate(const std::int32_t* blocks, std::int64_t count, int protection) const;
  // Maps a block at its place in a window, replacing what is there.
  Status PlaceInWindow(char* window, std::int32_t block);
  // The same in all windows that contain the place.
  Status PlaceInWindows(std::int32_t block);
  std::int64_t LentBytes() const;
  void Count() { system_calls_.fetch_add(1, std::memory_order_relaxed); }

  char* const base_;
  const std::int64_t virtual_bytes_;
  const std::int64_t block_bytes_;
  const int fd_;
  std::int64_t num_blocks_ = 0;
  // The block window: block b is at window_ + b * block_bytes_. Reserved at its first use for all blocks that this
  // machine could hold; the first windowed_blocks_ are mapped, as one mapping. Kernels may still use earlier windows
  // that became too small.
  char* window_ = nullptr;
  std::int64_t window_bytes_ = 0;
  std::int64_t windowed_blocks_ = 0;
  std::vector<std::pair<char*, std::int64_t>> old_windows_;  // with their sizes
  LentBlocks lent_;                                          // blocks in other files, with file and offset
  std::int64_t unchecked_bytes_ = -1;  // created since the last check of free memory; -1: never checked
  std::atomic<std::int64_t> system_calls_{0};
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_MEMFD_VMM_H_
