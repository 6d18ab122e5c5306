// The fake driver's memory: reservations are inaccessible pages, handles are ranges of a memfd, and mapping places one
// over the other.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <string>

#include "testing/fake_impl.h"
#include "vmm/limits.h"

namespace kvpage {
namespace {

constexpr int kNewByte = 0xFF;  // content of new memory: NaN in every float type

// Maps inaccessible or anonymous memory at a multiple of `alignment`; returns null if there is none.
void* MapAligned(std::size_t bytes, std::size_t alignment, int protection) {
  const std::size_t slack = alignment > static_cast<std::size_t>(PageBytes()) ? alignment : 0;
  void* at = mmap(nullptr, bytes + slack, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  if (slack == 0) return at;
  char* const begin = static_cast<char*>(at);
  const std::size_t before = (alignment - reinterpret_cast<std::uintptr_t>(begin) % alignment) % alignment;
  if (before > 0) munmap(begin, before);
  if (slack > before) munmap(begin + before + bytes, slack - before);
  return begin + before;
}

std::size_t WholePages(std::size_t bytes) {
  const std::size_t page = static_cast<std::size_t>(PageBytes());
  return (bytes + page - 1) / page * page;
}

}  // namespace

bool FakeDriver::Impl::Take(int device, std::size_t bytes) {
  const std::int64_t more = static_cast<std::int64_t>(bytes);
  if (more > options.device_bytes - used[device]) return false;
  used[device] += more;
  return true;
}

void FakeDriver::Impl::FreeHandle(cu::MemHandle handle) {
  const Handle& entry = handles.at(handle);
  if (entry.own_fd >= 0) {
    close(entry.own_fd);  // the memory lives while somebody has a descriptor or a mapping
  } else {
    static_cast<void>(
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, entry.file_offset, static_cast<off_t>(entry.bytes)));
  }
  if (!HasTwin(handle)) used[entry.device] -= static_cast<std::int64_t>(entry.bytes);
  handles.erase(handle);
}

bool FakeDriver::Impl::Accessible(cu::DevicePtr address, std::size_t bytes, bool write) const {
  const cu::DevicePtr end = address + bytes;
  if (auto it = allocations.upper_bound(address); it != allocations.begin()) {
    --it;
    if (end <= it->first + it->second.bytes) return true;
  }
  if (IsPinned(reinterpret_cast<const void*>(address), bytes)) return true;
  auto it = mappings.upper_bound(address);
  if (it == mappings.begin()) return false;
  const auto allowed = [&](cu::Access access) {
    return write ? access == cu::Access::kReadWrite : access != cu::Access::kNone;
  };
  for (--it; it != mappings.end() && it->first <= address && allowed(it->second.access); ++it) {
    address = std::max<cu::DevicePtr>(address, it->first + it->second.bytes);
    if (end <= address) return true;
    // The next mapping must follow without a gap.
    if (const auto next = std::next(it); next == mappings.end() || next->first != address) return false;
  }
  return false;
}

int FakeDriver::Impl::DeviceOf(cu::DevicePtr address) const {
  if (auto it = allocations.upper_bound(address); it != allocations.begin()) {
    --it;
    if (address < it->first + it->second.bytes) return it->second.device;
  }
  if (auto it = mappings.upper_bound(address); it != mappings.begin()) {
    --it;
    if (address < it->first + it->second.bytes) return handles.at(it->second.handle).device;
  }
  return -1;
}

bool FakeDriver::Impl::IsPinned(const void* host, std::size_t bytes) const {
  auto it = host_allocations.upper_bound(const_cast<void*>(host));
  if (it == host_allocations.begin()) return false;
  --it;
  return static_cast<const char*>(host) + bytes <= static_cast<char*>(it->first) + it->second;
}

namespace cu::fake {
namespace {

// Changing the page table may require waiting for all kernels: Options::mapping_waits.
void WaitForKernels(Entry* entry) {
  FakeDriver::Impl& fake = entry->fake();
  if (fake.options.mapping_waits) fake.changed.wait(*entry->lock(), [&] { return fake.Idle(); });
}

}  // namespace

Result MemGetInfo(std::size_t* free, std::size_t* total) {
  KVPAGE_ENTRY(MemGetInfo, Context);
  *total = static_cast<std::size_t>(entry->options.device_bytes);
  *free = *total - static_cast<std::size_t>(entry->used[entry->CurrentDevice()]);
  return Result::kSuccess;
}

Result MemGetAllocationGranularity(std::size_t* bytes, const AllocationProp* prop, Granularity) {
  KVPAGE_ENTRY(MemGetAllocationGranularity, Init);
  if (prop->location.id < 0 || prop->location.id >= entry->options.devices) {
    return entry->Violation("cuMemGetAllocationGranularity: no such device", Result::kInvalidDevice);
  }
  if (!entry->options.virtual_memory) return Result::kNotSupported;
  *bytes = static_cast<std::size_t>(entry->options.granularity);
  return Result::kSuccess;
}

Result MemAddressReserve(DevicePtr* address, std::size_t bytes, std::size_t alignment, DevicePtr,
                         unsigned long long flags) {
  KVPAGE_ENTRY(MemAddressReserve, Context);
  const std::size_t granularity = static_cast<std::size_t>(entry->options.granularity);
  if (bytes == 0 || bytes % granularity != 0 || (alignment & (alignment - 1)) != 0 || flags != 0) {
    return entry->Violation(
        "cuMemAddressReserve: bytes must be a multiple of the granularity, the alignment a power "
        "of two, flags 0");
  }
  void* at = MapAligned(bytes, std::max(alignment, granularity), PROT_NONE);
  if (at == nullptr) return Result::kOutOfMemory;
  *address = reinterpret_cast<DevicePtr>(at);
  entry->reservations[*address] = bytes;
  return Result::kSuccess;
}

Result MemAddressFree(DevicePtr address, std::size_t bytes) {
  KVPAGE_ENTRY(MemAddressFree, Context);
  const auto it = entry->reservations.find(address);
  if (it == entry->reservations.end() || it->second != bytes) {
    return entry->Violation("cuMemAddressFree: address and size must be those of one reservation");
  }
  const auto inside = entry->mappings.lower_bound(address);
  if (inside != entry->mappings.end() && inside->first < address + bytes) {
    return entry->Violation("cuMemAddressFree: something is still mapped in it");
  }
  munmap(reinterpret_cast<void*>(address), bytes);
  entry->reservations.erase(it);
  return Result::kSuccess;
}

Result MemCreate(MemHandle* handle, std::size_t bytes, const AllocationProp* prop, unsigned long long flags) {
  KVPAGE_ENTRY(MemCreate, Context);
  const FakeDriver::Options& options = entry->options;
  if (bytes == 0 || bytes % static_cast<std::size_t>(options.granularity) != 0 || flags != 0 ||
      prop->type != AllocationType::kPinned || prop->location.type != LocationType::kDevice) {
    return entry->Violation("cuMemCreate: wanted a multiple of the granularity, pinned, on a device, flags 0");
  }
  if (prop->location.id < 0 || prop->location.id >= options.devices) {
    return entry->Violation("cuMemCreate: no such device", Result::kInvalidDevice);
  }
  KVPAGE_CHECK_DEVICE("cuMemCreate", prop->location.id);
  if (prop->handle_type != HandleType::kNone) {
    if (!options.posix_handles) {
      return entry->Violation("cuMemCreate: the device said that it has no such handles", Result::kNotSupported);
    }
    if (options.posix_handles_denied) return Result::kNotPermitted;
  }
  if (!entry->Take(prop->location.id, bytes)) return Result::kOutOfMemory;
  const std::int64_t offset = entry->file_bytes;
  static const std::string fresh(std::size_t{64} << 10, static_cast<char>(kNewByte));
  bool written = ftruncate(entry->fd, offset + static_cast<off_t>(bytes)) == 0;
  for (std::size_t done = 0; written && done < bytes;) {
    const std::size_t piece = std::min(fresh.size(), bytes - done);
    const ssize_t n = pwrite(entry->fd, fresh.data(), piece, offset + static_cast<off_t>(done));
    written = n > 0;
    done += written ? static_cast<std::size_t>(n) : 0;
  }
  *handle = ++entry->last_handle;
  FakeDriver::Impl::Handle made;
  made.device = prop->location.id;
  made.bytes = bytes;
  made.file_offset = offset;
  made.shareable = prop->handle_type != HandleType::kNone;
  entry->handles[*handle] = made;
  entry->file_bytes = offset + static_cast<std::int64_t>(bytes);
  if (written) return Result::kSuccess;
  entry->FreeHandle(*handle);
  return Result::kOutOfMemory;
}

Result MemRelease(MemHandle handle) {
  KVPAGE_ENTRY(MemRelease, Context);
  const auto it = entry->handles.find(handle);
  if (it == entry->handles.end() || it->second.released) {
    return entry->Violation("cuMemRelease of a handle that does not exist (any more)");
  }
  // An imported handle may turn out to belong to another device, and must be releasable then.
  if (!it->second.imported) KVPAGE_CHECK_DEVICE("cuMemRelease", it->second.device);
  it->second.released = true;
  if (it->second.mappings > 0) {
    ++entry->released_while_mapped;  // stays alive until it is unmapped
  } else {
    entry->FreeHandle(handle);
  }
  return Result::kSuccess;
}

Result MemMap(DevicePtr address, std::size_t bytes, std::size_t offset, MemHandle handle, unsigned long long flags) {
  KVPAGE_ENTRY(MemMap, Context);
  const std::size_t granularity = static_cast<std::size_t>(entry->options.granularity);
  if (bytes == 0 || bytes % granularity != 0 || address % granularity != 0 || offset != 0 || flags != 0) {
    return entry->Violation("cuMemMap: address and size must be multiples of the granularity, offset and flags 0");
  }
  WaitForKernels(&entry);
  auto reservation = entry->reservations.upper_bound(address);
  if (reservation == entry->reservations.begin() ||
      (--reservation, address + bytes > reservation->first + reservation->second)) {
    return entry->Violation("cuMemMap: the range is not reserved");
  }
  const auto it = entry->handles.find(handle);
  if (it == entry->handles.end() || it->second.released) {
    return entry->Violation("cuMemMap: the handle does not exist or was released");
  }
  if (it->second.bytes != bytes) {
    // Not a violation: memory from another process may have any size, which the caller cannot know.
    if (it->second.imported) return Result::kInvalidValue;
    return entry->Violation("cuMemMap: wanted the whole size of the handle");
  }
  KVPAGE_CHECK_DEVICE("cuMemMap", it->second.device);
  auto next = entry->mappings.lower_bound(address);
  const bool above = next != entry->mappings.end() && next->first < address + bytes;
  if (above || (next != entry->mappings.begin() && (--next, next->first + next->second.bytes > address))) {
    return entry->Violation("cuMemMap: something is mapped there");
  }
  // No access before cuMemSetAccess: any access faults.
  if (mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, entry->FileOf(it->second),
           it->second.file_offset) == MAP_FAILED) {
    return Result::kOutOfMemory;
  }
  entry->mappings[address] = {bytes, handle, Access::kNone};
  ++it->second.mappings;
  return Result::kSuccess;
}

Result MemUnmap(DevicePtr address, std::size_t bytes) {
  KVPAGE_ENTRY(MemUnmap, Context);
  WaitForKernels(&entry);
  const auto it = entry->mappings.find(address);
  // The real driver refuses part of a mapping, but returns success for a range without mappings. Here the latter is a
  // violation too, because a caller that unmaps a hole has lost track of its mappings.
  if (it == entry->mappings.end() || it->second.bytes != bytes) {
    return entry->Violation("cuMemUnmap: address and size must be those of one cuMemMap");
  }
  KVPAGE_CHECK_DEVICE("cuMemUnmap", entry->handles.at(it->second.handle).device);
  if (mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
           -1, 0) == MAP_FAILED) {
    return Result::kUnknown;
  }
  FakeDriver::Impl::Handle& handle = entry->handles.at(it->second.handle);
  if (--handle.mappings == 0 && handle.released) entry->FreeHandle(it->second.handle);
  entry->mappings.erase(it);
  return Result::kSuccess;
}

Result MemSetAccess(DevicePtr address, std::size_t bytes, const AccessDesc* access, std::size_t count) {
  KVPAGE_ENTRY(MemSetAccess, Context);
  WaitForKernels(&entry);
  if (bytes == 0 || count != 1 || access->location.type != LocationType::kDevice) {
    return entry->Violation("cuMemSetAccess: wanted one device's access to some bytes");
  }
  DevicePtr at = address;
  for (auto it = entry->mappings.find(address); at < address + bytes; ++it) {
    if (it == entry->mappings.end() || it->first != at || at + it->second.bytes > address + bytes) {
      return entry->Violation("cuMemSetAccess: the range must be made up of whole mappings");
    }
    if (entry->handles.at(it->second.handle).device != access->location.id) {
      return entry->Violation("cuMemSetAccess: another device's memory", Result::kInvalidDevice);
    }
    at += it->second.bytes;
  }
  KVPAGE_CHECK_DEVICE("cuMemSetAccess", access->location.id);
  if (access->access == Access::kRead && !entry->options.read_only_access) return Result::kNotSupported;
  const int protection = access->access == Access::kReadWrite ? PROT_READ | PROT_WRITE
                         : access->access == Access::kRead    ? PROT_READ
                                                              : PROT_NONE;
  if (mprotect(reinterpret_cast<void*>(address), bytes, protection) != 0) return Result::kOutOfMemory;
  for (auto it = entry->mappings.find(address); it != entry->mappings.end() && it->first < at; ++it) {
    it->second.access = access->access;
  }
  return Result::kSuccess;
}

Result MemAlloc(DevicePtr* address, std::size_t bytes) {
  KVPAGE_ENTRY(MemAlloc, Context);
  if (bytes == 0) return entry->Violation("cuMemAlloc of no bytes");
  const int device = entry->CurrentDevice();
  const std::size_t pages = WholePages(bytes);
  if (!entry->Take(device, pages)) return Result::kOutOfMemory;
  void* at = MapAligned(pages, 0, PROT_READ | PROT_WRITE);
  if (at == nullptr) {
    entry->used[device] -= static_cast<std::int64_t>(pages);
    return Result::kOutOfMemory;
  }
  std::memset(at, kNewByte, pages);
  *address = reinterpret_cast<DevicePtr>(at);
  entry->allocations[*address] = {pages, device};
  return Result::kSuccess;
}

Result MemFree(DevicePtr address) {
  KVPAGE_ENTRY(MemFree, Context);
  if (address == 0) return Result::kSuccess;
  const auto it = entry->allocations.find(address);
  if (it == entry->allocations.end()) return entry->Violation("cuMemFree of what cuMemAlloc did not give");
  KVPAGE_CHECK_DEVICE("cuMemFree", it->second.device);
  munmap(reinterpret_cast<void*>(address), it->second.bytes);
  entry->used[it->second.device] -= static_cast<std::int64_t>(it->second.bytes);
  entry->allocations.erase(it);
  return Result::kSuccess;
}

Result MemHostAlloc(void** host, std::size_t bytes, unsigned int) {
  KVPAGE_ENTRY(MemHostAlloc, Context);
  if (bytes == 0) return entry->Violation("cuMemHostAlloc of no bytes");
  const std::size_t pages = WholePages(bytes);
  *host = MapAligned(pages, 0, PROT_READ | PROT_WRITE);
  if (*host == nullptr) return Result::kOutOfMemory;
  std::memset(*host, kNewByte, pages);
  entry->host_allocations[*host] = pages;
  return Result::kSuccess;
}

Result MemFreeHost(void* host) {
  KVPAGE_ENTRY(MemFreeHost, Context);
  const auto it = entry->host_allocations.find(host);
  if (it == entry->host_allocations.end()) return entry->Violation("cuMemFreeHost of what cuMemHostAlloc did not give");
  munmap(host, it->second);
  entry->host_allocations.erase(it);
  return Result::kSuccess;
}

Result MemHostGetDevicePointer(DevicePtr* address, void* host, unsigned int flags) {
  KVPAGE_ENTRY(MemHostGetDevicePointer, Context);
  if (!entry->IsPinned(host, 1) || flags != 0) {
    return entry->Violation("cuMemHostGetDevicePointer: not pinned memory, or flags");
  }
  *address = reinterpret_cast<DevicePtr>(host);
  return Result::kSuccess;
}

}  // namespace cu::fake
}  // namespace kvpage
