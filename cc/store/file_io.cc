#include "store/file_io.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace kvpage::store {
namespace {

// Calls transfer(parts, count, offset) until all parts are done.
template <class Transfer>
int TransferAll(std::vector<iovec>& parts, std::int64_t offset, const Transfer& transfer) {
  std::size_t first = 0;
  while (first < parts.size()) {
    if (parts[first].iov_len == 0) {
      ++first;
      continue;
    }
    const int count = static_cast<int>(std::min<std::size_t>(parts.size() - first, IOV_MAX));
    ssize_t done = transfer(&parts[first], count, offset);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return errno;
    if (done == 0) return kEndOfFile;
    offset += done;
    for (auto left = static_cast<std::size_t>(done); left > 0;) {
      iovec& part = parts[first];
      const std::size_t taken = std::min(left, part.iov_len);
      part.iov_base = static_cast<char*>(part.iov_base) + taken;
      part.iov_len -= taken;
      left -= taken;
      if (part.iov_len == 0) ++first;
    }
  }
  return 0;
}

}  // namespace

ssize_t FileIo::Write(int fd, const iovec* parts, int count, off_t offset) { return pwritev(fd, parts, count, offset); }
ssize_t FileIo::Read(int fd, const iovec* parts, int count, off_t offset) { return preadv(fd, parts, count, offset); }
int FileIo::Sync(int fd) { return fsync(fd); }
int FileIo::Rename(int folder, const char* from, const char* to) { return renameat(folder, from, folder, to); }

int WriteAll(FileIo* io, int fd, std::vector<iovec> parts, std::int64_t offset) {
  const int error = TransferAll(
      parts, offset, [&](const iovec* p, int count, std::int64_t at) { return io->Write(fd, p, count, at); });
  return error == kEndOfFile ? EIO : error;  // writing zero bytes is not progress
}

int ReadAll(FileIo* io, int fd, std::vector<iovec> parts, std::int64_t offset) {
  return TransferAll(parts, offset,
                     [&](const iovec* p, int count, std::int64_t at) { return io->Read(fd, p, count, at); });
}

Status FileError(const std::string& what, int error) {
  std::string message = "cannot " + what + ": " + std::generic_category().message(error);
  if (error == ENOSPC || error == EDQUOT) return ResourceExhausted(std::move(message));
  return FailedPrecondition(std::move(message));
}

}  // namespace kvpage::store
