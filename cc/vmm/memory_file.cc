#include "vmm/memory_file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <string>

#include "vmm/limits.h"
#include "vmm/system_error.h"

namespace kvpage {
namespace {

constexpr int kSeals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;

// "F_SEAL_WRITE, F_SEAL_SHRINK": the seals in kSeals that are missing from `seals`.
std::string MissingSeals(int seals) {
  std::string text;
  const auto add = [&](int seal, const char* name) {
    if ((seals & seal) != 0) return;
    if (!text.empty()) text += ", ";
    text += name;
  };
  add(F_SEAL_WRITE, "F_SEAL_WRITE");
  add(F_SEAL_SHRINK, "F_SEAL_SHRINK");
  add(F_SEAL_GROW, "F_SEAL_GROW");
  add(F_SEAL_SEAL, "F_SEAL_SEAL");
  return text;
}

Status NotSealable(const char* what) {
  return InvalidArgument(std::string("the descriptor is ") + what +
                         ": wanted the memfd that export_blocks of the sender has made");
}

// Transfers all bytes with calls of transfer(data, bytes, offset), which works like pread or pwrite.
template <class Byte, class Transfer>
Status TransferAll(const char* call, std::int64_t offset, Byte* data, std::int64_t bytes, Transfer transfer) {
  while (bytes > 0) {
    const ssize_t done = transfer(data, static_cast<std::size_t>(bytes), offset);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return SystemError(call, bytes, errno);
    if (done == 0) return Internal(std::string(call) + ": the file ends " + std::to_string(bytes) + " bytes too early");
    data += done;
    offset += done;
    bytes -= done;
  }
  return {};
}

}  // namespace

Status MemoryFile::Make(std::int64_t bytes, std::shared_ptr<MemoryFile>* out) {
  const int fd = memfd_create(kPoolMemory, MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return SystemError("export_blocks: memfd_create", -1, errno);
  out->reset(new MemoryFile(fd, bytes, /*received=*/false));
  if (ftruncate(fd, bytes) != 0) return SystemError("export_blocks: ftruncate", bytes, errno);
  return {};
}

Status MemoryFile::Receive(int fd, std::shared_ptr<MemoryFile>* out) {
  struct stat st;
  if (fstat(fd, &st) != 0) {
    return InvalidArgument("descriptor " + std::to_string(fd) + " is not open in this process");
  }
  if (!S_ISREG(st.st_mode)) return NotSealable("no file (a socket, a pipe, a device or a directory)");
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0) return NotSealable("a file that cannot be sealed, so its owner may change it or cut it short");
  struct statfs system;
  if (fstatfs(fd, &system) != 0 || system.f_type != TMPFS_MAGIC) return NotSealable("a memfd of huge pages");
  if ((seals & kSeals) != kSeals) {
    return InvalidArgument("the memfd lacks seals (" + MissingSeals(seals) +
                           "), so its sender may change it or cut it short: wanted one that export_blocks has sealed");
  }
  // A separate descriptor, so that the caller may close its own. It is only used for reading, whatever the caller's
  // mode.
  const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (own < 0) return SystemError("import_blocks: fcntl(F_DUPFD_CLOEXEC)", -1, errno);
  out->reset(new MemoryFile(own, std::int64_t{st.st_size}, /*received=*/true));
  (*out)->sealed_ = true;
  return {};
}

MemoryFile::~MemoryFile() { close(fd_); }

std::int64_t MemoryFile::PhysicalBytes() const {
  struct stat st;
  return fstat(fd_, &st) == 0 ? std::int64_t{st.st_blocks} * 512 : -1;
}

Status MemoryFile::Allocate(std::int64_t offset, std::int64_t bytes) {
  int rc;
  do {
    rc = fallocate(fd_, 0, offset, bytes);
  } while (rc != 0 && errno == EINTR);
  return rc == 0 ? Status() : SystemError("fallocate", bytes, errno);
}

void MemoryFile::Punch(std::int64_t offset, std::int64_t bytes) {
  static_cast<void>(fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes));
}

Status MemoryFile::Write(std::int64_t offset, const void* data, std::int64_t bytes) {
  return TransferAll("export_blocks: pwrite", offset, static_cast<const char*>(data), bytes,
                     [&](const char* from, std::size_t n, off_t at) { return pwrite(fd_, from, n, at); });
}

Status MemoryFile::Read(std::int64_t offset, void* data, std::int64_t bytes) const {
  return TransferAll("import_blocks: pread", offset, static_cast<char*>(data), bytes,
                     [&](char* to, std::size_t n, off_t at) { return pread(fd_, to, n, at); });
}

bool MemoryFile::Filled(std::int64_t offset, std::int64_t bytes) const {
  return lseek(fd_, offset, SEEK_HOLE) >= offset + bytes;
}

Status MemoryFile::Seal() {
  if (fcntl(fd_, F_ADD_SEALS, kSeals) != 0) {
    return FailedPrecondition(SystemError("export_blocks: fcntl(F_ADD_SEALS)", bytes_, errno).message());
  }
  sealed_ = true;
  return {};
}

}  // namespace kvpage
