// System calls on files of the store: whole reads and writes of scattered memory, and the calls that tests make fail.
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

// As the calls of the same names: the result, or -1 with errno set.
class FileIo {
 public:
  virtual ~FileIo() = default;
  virtual ssize_t Write(int fd, const iovec* parts, int count, off_t offset);
  virtual ssize_t Read(int fd, const iovec* parts, int count, off_t offset);
  virtual int Sync(int fd);
  virtual int Rename(int folder, const char* from, const char* to);
};

// Transfer everything, in as many calls as it takes. Return an errno, 0: done; ReadAll also kEndOfFile. `parts` is used
// up.
constexpr int kEndOfFile = -1;
int WriteAll(FileIo* io, int fd, std::vector<iovec> parts, std::int64_t offset);
int ReadAll(FileIo* io, int fd, std::vector<iovec> parts, std::int64_t offset);

// "cannot <what>: <text of the errno>". A full disk or quota is RESOURCE_EXHAUSTED.
Status FileError(const std::string& what, int error);

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_FILE_IO_H_
