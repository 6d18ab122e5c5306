// System calls of a store that tests can make fail or wait.
#ifndef KVPAGE_TESTS_FAULTY_IO_H_
#define KVPAGE_TESTS_FAULTY_IO_H_

#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "store/file_io.h"

namespace kvpage::store::testing {

// System calls that do less than requested, and fail on demand.
struct FaultyIo : FileIo {
  ssize_t Write(int fd, const iovec* parts, int count, off_t offset) override {
    if (write_error != 0 && writes_left.fetch_sub(1) <= 0) return Fail(write_error);
    while (hold_writes) usleep(1000);
    const iovec part = Short(parts);
    return short_calls ? FileIo::Write(fd, &part, 1, offset) : FileIo::Write(fd, parts, count, offset);
  }
  ssize_t Read(int fd, const iovec* parts, int count, off_t offset) override {
    if (read_error != 0) return Fail(read_error);
    while (hold_reads) usleep(1000);
    const iovec part = Short(parts);
    return short_calls ? FileIo::Read(fd, &part, 1, offset) : FileIo::Read(fd, parts, count, offset);
  }
  int Sync(int fd) override { return sync_error != 0 ? static_cast<int>(Fail(sync_error)) : FileIo::Sync(fd); }
  int Rename(int folder, const char* from, const char* to) override {
    return rename_error != 0 ? static_cast<int>(Fail(rename_error)) : FileIo::Rename(folder, from, to);
  }

  static ssize_t Fail(int error) {
    errno = error;
    return -1;
  }
  static iovec Short(const iovec* parts) { return {parts->iov_base, parts->iov_len / 3 + 1}; }

  std::atomic<bool> short_calls{false}, hold_reads{false}, hold_writes{false};
  std::atomic<int> write_error{0}, read_error{0}, sync_error{0}, rename_error{0};
  std::atomic<int> writes_left{0};
};

}  // namespace kvpage::store::testing

#endif  // KVPAGE_TESTS_FAULTY_IO_H_
