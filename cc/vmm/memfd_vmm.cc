#include "vmm/memfd_vmm.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "vmm/headroom.h"
#include "vmm/limits.h"
#include "vmm/system_error.h"

namespace kvpage {
namespace {

// Bytes that may be created between two checks of the system's free memory. A check reads a few files in /proc and
// /sys (tens of microseconds); zeroing 64 MiB takes milliseconds.
constexpr std::int64_t kHeadroomStride = std::int64_t{64} << 20;

// Returning memory never fails because of too few blocks.
Status NotMemory(const Status& status) {
  return status.code() == Code::kResourceExhausted ? Internal(status.message()) : status;
}

// Linux 6.1; older headers do not name it.
constexpr int kMadvCollapse = 25;
// The kernel gives up if another thread is using a page for a moment.
constexpr int kCollapseTries = 10;

// Distance from the last address that is a multiple of a huge page; 0 if there are no huge pages.
std::int64_t Misalignment(const void* at) {
  const auto huge = static_cast<std::uintptr_t>(HugePageBytes());
  return huge == 0 ? 0 : static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(at) % huge);
}

// Reserves address space aligned to a huge page, if it is large enough to hold one. Returns MAP_FAILED with errno set,
// like mmap.
void* Reserve(std::int64_t bytes, int protection) {
  const auto map = [&](std::int64_t count) {
    return mmap(nullptr, static_cast<std::size_t>(count), protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                0);
  };
  const auto unmap = [](char* begin, std::int64_t count) {
    if (count > 0) munmap(begin, static_cast<std::size_t>(count));
  };
  void* const reserved = map(bytes);
  const std::int64_t huge = HugePageBytes(), size = (bytes + PageBytes() - 1) / PageBytes() * PageBytes();
  if (reserved == MAP_FAILED || huge == 0 || bytes < huge) return reserved;
  if (Misalignment(reserved) == 0) return reserved;
  void* const larger = map(size + huge);
  if (larger == MAP_FAILED) return reserved;  // also works, with small pages
  unmap(static_cast<char*>(reserved), bytes);
  const std::int64_t before = (huge - Misalignment(larger)) % huge;
  char* const begin = static_cast<char*>(larger) + before;
  unmap(static_cast<char*>(larger), before);
  unmap(begin + size, huge - before);
  return begin;
}

}  // namespace

Status MemfdVmm::Make(std::int64_t virtual_bytes, std::int64_t block_bytes, std::unique_ptr<MemfdVmm>* out) {
  if (block_bytes <= 0 || block_bytes % PageBytes() != 0) {
    return InvalidArgument("block_bytes is " + std::to_string(block_bytes) +
                           ", wanted a positive multiple of the page size " + std::to_string(PageBytes()));
  }
  const int fd = memfd_create(kPoolMemory, MFD_CLOEXEC);
  if (fd < 0) return SystemError("KVPool: memfd_create", -1, errno);
  // Anonymous, private and read-only: reads find the kernel's shared zero page, a stray write faults.
  void* base = Reserve(virtual_bytes, PROT_READ);
  if (base == MAP_FAILED) {
    Status status = SystemError("KVPool: reserving virtual memory: mmap", virtual_bytes, errno);
    if (status.code() == Code::kResourceExhausted) {
      status = InvalidArgument(status.message() +
                               ": that is the product of num_layers, num_kv_heads, head_dim, max_slots and max_seq_len "
                               "in bytes; make one of them smaller, or raise `ulimit -v`");
    }
    close(fd);
    return status;
  }
  out->reset(new MemfdVmm(static_cast<char*>(base), virtual_bytes, block_bytes, fd));
  (*out)->system_calls_ = 2;
  return {};
}

MemfdVmm::~MemfdVmm() {
  if (window_ != nullptr) munmap(window_, static_cast<std::size_t>(window_bytes_));
  for (const auto& [window, bytes] : old_windows_) munmap(window, static_cast<std::size_t>(bytes));
  munmap(base_, static_cast<std::size_t>(virtual_bytes_));
  close(fd_);
}

Status MemfdVmm::Grow(std::int64_t num_blocks) {
  if (num_blocks <= num_blocks_) return {};
  const std::int64_t bytes = num_blocks * block_bytes_;
  Count();
  if (ftruncate(fd_, bytes) != 0) return SystemError("ftruncate", bytes, errno);
  const std::int64_t before = num_blocks_;
  num_blocks_ = num_blocks;
  if (window_ == nullptr) return {};
  Status status = ExtendWindow();
  if (!status.ok()) num_blocks_ = before;  // no memory for a file of this size
  return status;
}

Status MemfdVmm::Window(char** out) {
  KVPAGE_RETURN_IF_ERROR(ExtendWindow());
  *out = window_;
  return {};
}

Status MemfdVmm::CheckHeadroom(std::int64_t bytes) {
  if (unchecked_bytes_ >= 0 && unchecked_bytes_ + bytes < kHeadroomStride) {
    unchecked_bytes_ += bytes;
    return {};
  }
  KVPAGE_RETURN_IF_ERROR(kvpage::CheckHeadroom(bytes));
  unchecked_bytes_ = 0;
  return {};
}

Status MemfdVmm::Create(const std::int32_t* blocks, std::int64_t count) {
  KVPAGE_RETURN_IF_ERROR(CheckHeadroom(count * block_bytes_));
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t run = BlockRun(blocks + done, count - done);
    const std::int64_t bytes = run * block_bytes_;
    int rc;
    do {
      Count();
      rc = fallocate(fd_, 0, blocks[done] * block_bytes_, bytes);
    } while (rc != 0 && errno == EINTR);
    if (rc != 0) {
      Status status = SystemError("fallocate", bytes, errno);
      // Frees everything that this call allocated, including the start of the failed run.
      static_cast<void>(Destroy(blocks, done + run));
      return status;
    }
    done += run;
  }
  return {};
}

Status MemfdVmm::Destroy(const std::int32_t* blocks, std::int64_t count) {
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t run = BlockRun(blocks + done, count - done);
    Count();
    if (fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, blocks[done] * block_bytes_, run * block_bytes_) !=
        0) {
      return NotMemory(SystemError("fallocate(PUNCH_HOLE)", run * block_bytes_, errno));
    }
    done += run;
  }
  return {};
}

Status MemfdVmm::Map(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) {
  // MAP_POPULATE: page table entries are made here, on the calling thread, not by page faults inside a kernel.
  return MapRuns(offset, blocks, count, PROT_READ | PROT_WRITE, MAP_POPULATE);
}

Status MemfdVmm::MapReadOnly(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) {
  // Not populated. An alias maps a whole context at once: populating 128 MiB takes the calling thread 9 ms, the page
  // faults take the threads that first read it 5 to 7 ms. Fork and first decode step together take as long as with
  // MAP_POPULATE for a few blocks, and up to a third less for many (benchmarks/README.md).
  return MapRuns(offset, blocks, count, PROT_READ, /*flags=*/0);
}

Status MemfdVmm::MapRuns(std::int64_t offset, const std::int32_t* blocks, std::int64_t count, int protection,
                         int flags) {
  for (std::int64_t done = 0; done < count;) {
    const Backing backing = Locate(blocks + done, count - done, protection);
    const std::int64_t run = backing.run;
    const std::int64_t bytes = run * block_bytes_;
    Count();
    void* at = mmap(base_ + offset + done * block_bytes_, static_cast<std::size_t>(bytes), backing.protection,
                    backing.sharing | MAP_FIXED | flags, backing.fd, backing.offset);
    if (at == MAP_FAILED) {
      const int error = errno;
      Status status = SystemError("mapping blocks: mmap", bytes, error);
      if (error == ENOMEM) {
        status = status.WithMessage(status.message() + ": the process may have reached vm.max_map_count (" +
                                    std::to_string(MaxMapCount()) + " mappings); larger blocks need fewer");
      }
      // A failed MAP_FIXED may already have removed the old mapping: turn the whole range back into a readable hole.
      static_cast<void>(Hole(offset, (done + run) * block_bytes_));
      return status;
    }
    done += run;
  }
  return {};
}

Status MemfdVmm::Remap(std::int64_t offset, const std::int32_t* old_blocks, const std::int32_t* blocks,
                       std::int64_t count) {
  // One block at a time: a failed mapping may leave a hole, and only where it stood can the old one be put back.
  for (std::int64_t i = 0; i < count; ++i) {
    Status status = Map(offset + i * block_bytes_, blocks + i, 1);
    for (std::int64_t back = i; !status.ok() && back >= 0; --back) {
      if (Status rollback = MapReadOnly(offset + back * block_bytes_, old_blocks + back, 1); !rollback.ok()) {
        return Internal(status.message() + "; putting back what was mapped failed too (" + rollback.message() + ")");
      }
    }
    KVPAGE_RETURN_IF_ERROR(status);
  }
  return {};
}

Status MemfdVmm::Exchange(std::int64_t offset, std::int32_t old_block, std::int32_t block, bool writable) {
  // Populated in both cases: the old block's pages were mapped, and no kernel should fault for the new ones. Does not
  // use MapRuns, which leaves a hole after a failure, because a handler may be reading here.
  const auto map = [&](std::int32_t number) {
    Count();
    void* at = mmap(base_ + offset, static_cast<std::size_t>(block_bytes_), PROT_READ | (writable ? PROT_WRITE : 0),
                    MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd_, number * block_bytes_);
    return at == MAP_FAILED ? SystemError("mapping a block again: mmap", block_bytes_, errno) : Status();
  };
  Status status = map(block);
  if (status.ok()) return status;
  if (Status rollback = map(old_block); !rollback.ok()) {
    return Internal(status.message() + "; putting back what was mapped failed too (" + rollback.message() + ")");
  }
  return status;
}

Status MemfdVmm::ExtendWindow() {
  if (windowed_blocks_ == num_blocks_) return {};
  const std::int64_t bytes = num_blocks_ * block_bytes_;
  if (bytes > window_bytes_) {
    const std::int64_t wanted = std::max(2 * bytes, std::max<std::int64_t>(AvailableBytes(), 0));
    Count();
    void* window = Reserve(wanted, PROT_NONE);
    if (window == MAP_FAILED) return SystemError("reserving the block window: mmap", wanted, errno);
    if (window_ != nullptr) old_windows_.emplace_back(window_, window_bytes_);
    window_ = static_cast<char*>(window);
    window_bytes_ = wanted;
    windowed_blocks_ = 0;
  }
  const std::int64_t begin = windowed_blocks_ * block_bytes_;
  Count();
  // Not populated: pages of blocks without memory must not get any.
  void* at = mmap(window_ + begin, static_cast<std::size_t>(bytes - begin), PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_FIXED, fd_, begin);
  if (at == MAP_FAILED) return SystemError("mapping the block window: mmap", bytes - begin, errno);
  windowed_blocks_ = num_blocks_;
  for (const auto& [block, unused] : lent_.places()) {
    if (block * block_bytes_ >= begin) KVPAGE_RETURN_IF_ERROR(PlaceInWindow(window_, block));
  }
  return {};
}

Status MemfdVmm::Copy(const std::int32_t* from, const std::int32_t* to, std::int64_t count) {
  KVPAGE_RETURN_IF_ERROR(ExtendWindow());
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(window_ + to[i] * block_bytes_, window_ + from[i] * block_bytes_,
                static_cast<std::size_t>(block_bytes_));
  }
  return {};
}

std::int64_t MemfdVmm::huge_page_bytes() const { return Misalignment(base_) == 0 ? HugePageBytes() : 0; }

Status MemfdVmm::Collapse(std::int32_t first, std::int64_t count) {
  KVPAGE_RETURN_IF_ERROR(ExtendWindow());
  // Through the window: other mappings of these pages find the huge page at their next access.
  for (int tries = 1;; ++tries) {
    Count();
    if (madvise(window_ + first * block_bytes_, static_cast<std::size_t>(count * block_bytes_), kMadvCollapse) == 0) {
      return {};
    }
    if (errno == EAGAIN && tries < kCollapseTries) continue;
    return NotMemory(SystemError("madvise(MADV_COLLAPSE)", count * block_bytes_, errno));
  }
}

Status MemfdVmm::Hole(std::int64_t offset, std::int64_t bytes) {
  Count();
  void* at = mmap(base_ + offset, static_cast<std::size_t>(bytes), PROT_READ,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  if (at == MAP_FAILED) return NotMemory(SystemError("unmapping blocks: mmap", bytes, errno));
  return {};
}

Status MemfdVmm::Unmap(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) {
  Status status = Hole(offset, count * block_bytes_);
  if (status.ok()) return status;
  // As in Map, the old mapping may be gone. Mapping a block again at the same place changes nothing.
  if (Status rollback = Map(offset, blocks, count); !rollback.ok()) {
    return Internal(status.message() + "; putting back what was mapped failed too (" + rollback.message() + ")");
  }
  return status;
}

Status MemfdVmm::Move(std::int64_t from, std::int64_t to, const std::int32_t* blocks, std::int64_t count) {
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t run = Locate(blocks + done, count - done, PROT_READ).run;
    const std::int64_t begin = from + done * block_bytes_, target = to + done * block_bytes_;
    const std::int64_t bytes = run * block_bytes_;
    Count();
    // DONTUNMAP: the old addresses stay reserved until the hole is there, so no other mapping can take them.
    void* at = mremap(base_ + begin, static_cast<std::size_t>(bytes), static_cast<std::size_t>(bytes),
                      MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, base_ + target);
    // Linux before 5.13 does not support this for shared memory: map and unmap instead.
    Status status = at == MAP_FAILED ? Vmm::Move(begin, target, blocks + done, run) : Hole(begin, bytes);
    if (!status.ok()) {
      // Runs that were not moved, including this one, are still mapped at their old place.
      static_cast<void>(Hole(target, bytes));
      if (done > 0) static_cast<void>(Move(to, from, blocks, done));
      return status;
    }
    done += run;
  }
  return {};
}

Status MemfdVmm::Fill(std::int64_t offset, std::int64_t bytes, int byte) {
  std::memset(base_ + offset, byte, static_cast<std::size_t>(bytes));
  return {};
}

std::int64_t MemfdVmm::PhysicalBytes() const {
  struct stat st;
  return fstat(fd_, &st) == 0 ? std::int64_t{st.st_blocks} * 512 + LentBytes() : -1;
}

}  // namespace kvpage
