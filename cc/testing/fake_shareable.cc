// The fake driver's handles that other processes can import. A shareable handle is the descriptor of a memfd that holds
// only the handle's memory, and whose name identifies the device.
//
// A handle's memory is moved to such a file when it is first shared: with one file per handle from the start, a pool of
// small blocks would use up the descriptors of the process.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "testing/fake_impl.h"

namespace kvpage {
namespace {

constexpr char kName[] = "fake_driver_device_";

int ProtectionOf(cu::Access access) {
  if (access == cu::Access::kNone) return PROT_NONE;
  return access == cu::Access::kRead ? PROT_READ : PROT_READ | PROT_WRITE;
}

bool CopyFile(int from, std::int64_t offset, int to, std::size_t bytes) {
  std::string piece(std::size_t{64} << 10, '\0');
  for (std::size_t done = 0; done < bytes;) {
    const std::size_t wanted = std::min(piece.size(), bytes - done);
    const ssize_t got = pread(from, piece.data(), wanted, offset + static_cast<off_t>(done));
    if (got <= 0 || pwrite(to, piece.data(), static_cast<std::size_t>(got), static_cast<off_t>(done)) != got) {
      return false;
    }
    done += static_cast<std::size_t>(got);
  }
  return true;
}

std::uint64_t InodeOf(int fd) {
  struct stat st;
  return fstat(fd, &st) == 0 ? static_cast<std::uint64_t>(st.st_ino) : 0;
}

// Finds the device and the size of the memory behind a descriptor. Returns false if it is not a handle of a fake
// driver.
bool Describe(int fd, int* device, std::size_t* bytes) {
  struct stat st;
  if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) return false;
  char path[64], target[256];
  std::snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(path, target, sizeof(target) - 1);
  if (length <= 0) return false;
  target[length] = '\0';
  const std::string begin = std::string("/memfd:") + kName;
  if (std::strncmp(target, begin.c_str(), begin.size()) != 0) return false;
  *device = static_cast<int>(std::strtol(target + begin.size(), nullptr, 10));
  *bytes = static_cast<std::size_t>(st.st_size);
  return *bytes > 0;
}

}  // namespace

bool FakeDriver::Impl::MakeShared(cu::MemHandle handle) {
  Handle& entry = handles.at(handle);
  if (entry.own_fd >= 0) return true;
  const int own = memfd_create((kName + std::to_string(entry.device)).c_str(), MFD_CLOEXEC);
  if (own < 0) return false;
  const bool copied =
      ftruncate(own, static_cast<off_t>(entry.bytes)) == 0 && CopyFile(fd, entry.file_offset, own, entry.bytes);
  if (!copied) {
    close(own);
    return false;
  }
  for (const auto& [address, mapping] : mappings) {
    if (mapping.handle != handle) continue;
    // Readers see the same bytes before and after. The new mapping replaces the old one, which the system does not
    // refuse.
    if (mmap(reinterpret_cast<void*>(address), mapping.bytes, ProtectionOf(mapping.access), MAP_SHARED | MAP_FIXED, own,
             0) == MAP_FAILED) {
      close(own);
      return false;
    }
  }
  static_cast<void>(
      fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, entry.file_offset, static_cast<off_t>(entry.bytes)));
  entry.own_fd = own;
  entry.file_offset = 0;
  entry.inode = InodeOf(own);
  return true;
}

bool FakeDriver::Impl::HasTwin(cu::MemHandle handle) const {
  const Handle& entry = handles.at(handle);
  if (entry.own_fd < 0) return false;
  for (const auto& [other, twin] : handles) {
    if (other != handle && twin.own_fd >= 0 && twin.inode == entry.inode) return true;
  }
  return false;
}

namespace cu::fake {

Result MemExportToShareableHandle(void* descriptor, MemHandle handle, HandleType type, unsigned long long flags) {
  KVPAGE_ENTRY(MemExportToShareableHandle, Context);
  const auto it = entry->handles.find(handle);
  if (it == entry->handles.end() || it->second.released) {
    return entry->Violation("cuMemExportToShareableHandle of a handle that does not exist (any more)");
  }
  if (descriptor == nullptr || type != HandleType::kPosixFileDescriptor || flags != 0) {
    return entry->Violation("cuMemExportToShareableHandle: wanted a file descriptor, flags 0");
  }
  if (!it->second.shareable) {
    return entry->Violation("cuMemExportToShareableHandle: cuMemCreate was not asked for handles of this type");
  }
  if (!entry->MakeShared(handle)) return Result::kOutOfMemory;
  const int fd = fcntl(it->second.own_fd, F_DUPFD, 0);
  if (fd < 0) return Result::kOperatingSystem;
  *static_cast<int*>(descriptor) = fd;
  return Result::kSuccess;
}

Result MemImportFromShareableHandle(MemHandle* handle, void* descriptor, HandleType type) {
  KVPAGE_ENTRY(MemImportFromShareableHandle, Context);
  if (handle == nullptr || type != HandleType::kPosixFileDescriptor) {
    return entry->Violation("cuMemImportFromShareableHandle: wanted a file descriptor");
  }
  FakeDriver::Impl::Handle made;
  const int fd = static_cast<int>(reinterpret_cast<std::intptr_t>(descriptor));
  // Not a violation: anybody may have sent it.
  if (!Describe(fd, &made.device, &made.bytes)) return Result::kInvalidValue;
  if (made.device >= entry->options.devices) return Result::kInvalidDevice;
  made.own_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (made.own_fd < 0) return Result::kOperatingSystem;
  made.inode = InodeOf(fd);
  made.shareable = made.imported = true;
  *handle = ++entry->last_handle;
  entry->handles[*handle] = made;
  if (entry->HasTwin(*handle) || entry->Take(made.device, made.bytes)) return Result::kSuccess;
  close(made.own_fd);
  entry->handles.erase(*handle);
  return Result::kOutOfMemory;
}

Result MemGetAllocationProperties(AllocationProp* prop, MemHandle handle) {
  KVPAGE_ENTRY(MemGetAllocationProperties, Context);
  const auto it = entry->handles.find(handle);
  if (it == entry->handles.end() || it->second.released) {
    return entry->Violation("cuMemGetAllocationPropertiesFromHandle of a handle that does not exist (any more)");
  }
  *prop = {};
  prop->location.id = it->second.device;
  if (it->second.shareable) prop->handle_type = HandleType::kPosixFileDescriptor;
  return Result::kSuccess;
}

}  // namespace cu::fake
}  // namespace kvpage
