// System calls on the store's files: complete transfers between files and scattered memory, and the calls that tests
// can make fail.
#ifndef KVPAGE_STORE_FILE_IO_H_
#define KVPAGE_STORE_FILE_IO_H_

#include <sys/types.h>
#include <sys/uio.h>

#include <cstdint>
#include <string>
#include <vector>

#include "base/fd.h"
#include "base/status.h"

namespace kvpage::store {

// Like the system calls of the same names: the result, or -1 with errno set.
class FileIo {
 public:
  virtual ~FileIo() = default;
  virtual ssize_t Write(int fd, const iovec* parts, int count, off_t offset);
  virtual ssize_t Read(int fd, const iovec* parts, int count, off_t offset);
  virtual int Sync(int fd);
  virtual int Rename(int folder, const char* from, const char* to);
};

// Transfer everything, in as many calls as necessary. Return 0 or an errno; ReadAll may also return kEndOfFile. `parts`
// is consumed.
constexpr int kEndOfFile = -1;
int WriteAll(FileIo* io, int fd, std::vector<iovec> parts, std::int64_t offset);
int ReadAll(FileIo* io, int fd, std::vector<iovec> parts, std::int64_t offset);

// "cannot <what>: <text of the errno>". RESOURCE_EXHAUSTED if the disk or the quota is full.
Status FileError(const std::string& what, int error);

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_FILE_IO_H_
