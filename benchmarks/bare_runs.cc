// The bare system calls behind an alias, and the bare copy of a block: what `KVPool.fork` is measured against.
//
// Blocks lie in a memfd, as a pool's do. A caller names the same runs of blocks that the pool maps.
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

using Clock = std::chrono::steady_clock;

double Since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// CPU time of this thread: other processes do not count.
double ThreadSeconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

// A file with memory at the given runs (offsets and lengths in bytes); -1 on failure.
extern "C" int make_blocks(const std::int64_t* offsets, const std::int64_t* lengths, std::int64_t runs,
                           std::int64_t bytes) {
  const int fd = memfd_create("sharing benchmark", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, bytes) != 0) return -1;
  for (std::int64_t i = 0; i < runs; ++i) {
    if (fallocate(fd, 0, offsets[i], lengths[i]) != 0) return -1;
  }
  return fd;
}

extern "C" void free_blocks(int fd) { close(fd); }

// An address range to map runs in; null on failure.
extern "C" void* reserve_range(std::int64_t bytes) {
  void* base =
      mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return base == MAP_FAILED ? nullptr : base;
}

// Unmaps all runs of the range; 0 if it worked.
extern "C" int empty_range(void* base, std::int64_t bytes) {
  const int flags = MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE;
  return mmap(base, static_cast<std::size_t>(bytes), PROT_READ, flags, -1, 0) == MAP_FAILED;
}

extern "C" void free_range(void* base, std::int64_t bytes) { munmap(base, static_cast<std::size_t>(bytes)); }

// Maps the runs read-only where `places` says, in the range, with their page table entries if `populate`. Returns CPU
// seconds; below 0 on failure.
extern "C" double map_runs(void* base, int fd, const std::int64_t* offsets, const std::int64_t* lengths,
                           const std::int64_t* places, std::int64_t runs, bool populate) {
  const int flags = MAP_SHARED | MAP_FIXED | (populate ? MAP_POPULATE : 0);
  bool failed = false;
  const double begin = ThreadSeconds();
  for (std::int64_t i = 0; i < runs; ++i) {
    failed |= mmap(static_cast<char*>(base) + places[i], static_cast<std::size_t>(lengths[i]), PROT_READ, flags, fd,
                   offsets[i]) == MAP_FAILED;
  }
  return failed ? -1 : ThreadSeconds() - begin;
}

// Wall seconds to copy `bytes` at the front of a mapping of the file to its end.
extern "C" double copy_bytes(int fd, std::int64_t file_bytes, std::int64_t bytes) {
  char* base = static_cast<char*>(
      mmap(nullptr, static_cast<std::size_t>(file_bytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0));
  if (base == MAP_FAILED) return -1;
  const Clock::time_point begin = Clock::now();
  std::memcpy(base + file_bytes - bytes, base, static_cast<std::size_t>(bytes));
  const double seconds = Since(begin);
  munmap(base, static_cast<std::size_t>(file_bytes));
  return seconds;
}
