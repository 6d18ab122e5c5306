// The part of MemfdVmm for blocks whose memory is in another file.
//
// Their read-only mappings are private: a private mapping shows the file's contents for pages that are never written
// through it and, unlike a shared mapping of a writable descriptor, does not count as a writer, which would prevent
// sealing the file. A sealed file has only read-only mappings, whatever the caller asked for.
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "vmm/headroom.h"
#include "vmm/memfd_vmm.h"
#include "vmm/memory_file.h"
#include "vmm/system_error.h"

namespace kvpage {

MemfdVmm::Backing MemfdVmm::Locate(const std::int32_t* blocks, std::int64_t count, int protection) const {
  Backing own = {BlockRun(blocks, count), fd_, blocks[0] * block_bytes_, protection, MAP_SHARED};
  if (lent_.empty()) return own;
  const LentBlocks::Place* const first = lent_.Find(blocks[0]);
  if (first == nullptr) {
    std::int64_t run = 1;
    while (run < own.run && lent_.Find(blocks[run]) == nullptr) ++run;
    own.run = run;
    return own;
  }
  const MemoryFile& file = *first->file;
  const bool writable = (protection & PROT_WRITE) != 0 && !file.sealed();
  Backing lent = {1, file.fd(), first->offset, writable ? protection : PROT_READ, writable ? MAP_SHARED : MAP_PRIVATE};
  while (lent.run < count && lent_.Offset(file, blocks[lent.run]) == lent.offset + lent.run * block_bytes_) ++lent.run;
  return lent;
}

Status MemfdVmm::PlaceInWindow(char* window, std::int32_t block) {
  const Backing backing = Locate(&block, 1, PROT_READ | PROT_WRITE);
  Count();
  void* at = mmap(window + block * block_bytes_, static_cast<std::size_t>(block_bytes_), backing.protection,
                  backing.sharing | MAP_FIXED, backing.fd, backing.offset);
  return at == MAP_FAILED ? SystemError("mapping a block in the window: mmap", block_bytes_, errno) : Status();
}

Status MemfdVmm::PlaceInWindows(std::int32_t block) {
  const std::int64_t end = (block + 1) * block_bytes_;
  if (window_ != nullptr && end <= windowed_blocks_ * block_bytes_) {
    KVPAGE_RETURN_IF_ERROR(PlaceInWindow(window_, block));
  }
  for (const auto& [window, bytes] : old_windows_) {
    if (end <= bytes) KVPAGE_RETURN_IF_ERROR(PlaceInWindow(window, block));
  }
  return {};
}

Status MemfdVmm::Lend(const std::shared_ptr<MemoryFile>& file, const std::int32_t* blocks, const std::int64_t* offsets,
                      std::int64_t count) {
  if (!file->sealed()) KVPAGE_RETURN_IF_ERROR(CheckHeadroom(count * block_bytes_));
  for (std::int64_t i = 0; i < count; ++i) {
    lent_.Add(blocks[i], file, offsets[i]);
    Status status = file->sealed() ? Status() : file->Allocate(offsets[i], block_bytes_);
    if (!file->sealed()) Count();
    if (status.ok()) status = PlaceInWindows(blocks[i]);
    if (status.ok()) continue;
    for (std::int64_t done = 0; done <= i; ++done) Return(blocks[done]);
    return status;
  }
  return {};
}

void MemfdVmm::Return(std::int32_t block) {
  const LentBlocks::Place lent = lent_.Remove(block);
  if (lent.file == nullptr) return;
  // If this fails, the window still maps the file: its memory is kept until the pool ends, but nobody reads it there.
  static_cast<void>(PlaceInWindows(block));
  if (lent.file->sealed()) return;
  Count();
  lent.file->Punch(lent.offset, block_bytes_);
}

Status MemfdVmm::Seal(const std::shared_ptr<MemoryFile>& file) {
  const std::vector<std::int32_t> blocks = lent_.BlocksOf(*file);
  // The window first, because it maps the blocks for writing as long as they are not sealed.
  Status status;
  const auto protect = [&](char* window, std::int64_t bytes) {
    for (const std::int32_t block : blocks) {
      if (!status.ok() || (block + 1) * block_bytes_ > bytes) continue;
      const Backing backing = Locate(&block, 1, PROT_READ);
      Count();
      void* at = mmap(window + block * block_bytes_, static_cast<std::size_t>(block_bytes_), PROT_READ,
                      backing.sharing | MAP_FIXED, backing.fd, backing.offset);
      if (at == MAP_FAILED) status = SystemError("mapping a block read-only: mmap", block_bytes_, errno);
    }
  };
  if (window_ != nullptr) protect(window_, windowed_blocks_ * block_bytes_);
  for (const auto& [window, bytes] : old_windows_) protect(window, bytes);
  Count();
  if (status.ok()) status = file->Seal();
  if (status.ok()) return {};
  for (const std::int32_t block : blocks) {
    if (Status back = PlaceInWindows(block); !back.ok()) {
      return Internal(status.message() + "; mapping the window again failed too: " + back.message());
    }
  }
  return status;
}

std::int64_t MemfdVmm::LentBytes() const {
  std::int64_t bytes = 0;
  for (const auto& [file, unused] : lent_.counts()) {
    if (!file->received()) bytes += std::max<std::int64_t>(file->PhysicalBytes(), 0);
  }
  return bytes;
}

}  // namespace kvpage
