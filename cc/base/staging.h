// Staging: memory that is filled once, passed on and freed. Uses huge pages if available: faulting in small pages takes
// several times as long as the copy itself.
#ifndef KVPAGE_BASE_STAGING_H_
#define KVPAGE_BASE_STAGING_H_

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace kvpage {

struct FreeStaging {
  void operator()(char* memory) const { std::free(memory); }
};
using Staging = std::unique_ptr<char[], FreeStaging>;

// Not initialized. Throws std::bad_alloc.
inline Staging NewStaging(std::int64_t bytes) {
  constexpr std::int64_t kLargePage = std::int64_t{2} << 20;
  const bool large = bytes >= kLargePage;
  void* memory = nullptr;
  const std::size_t alignment = large ? kLargePage : alignof(std::max_align_t);
  if (posix_memalign(&memory, alignment, static_cast<std::size_t>(bytes)) != 0) throw std::bad_alloc();
  // Without huge pages, this is ordinary memory.
  if (large) static_cast<void>(madvise(memory, static_cast<std::size_t>(bytes), MADV_HUGEPAGE));
  return Staging(static_cast<char*>(memory));
}

}  // namespace kvpage

#endif  // KVPAGE_BASE_STAGING_H_
