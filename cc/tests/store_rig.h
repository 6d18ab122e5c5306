// Helpers for tests of a pool with a store: a disk that is slow or fails on demand.
#ifndef KVPAGE_TESTS_STORE_RIG_H_
#define KVPAGE_TESTS_STORE_RIG_H_

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <memory>

#include "tests/prefix_util.h"
#include "tests/store_util.h"

namespace kvpage::testing {

// Reads and writes wait while `hold` is set, and fail with `error`.
struct HeldIo : store::FileIo {
  ssize_t Write(int fd, const iovec* parts, int count, off_t offset) override {
    return Wait() ? FileIo::Write(fd, parts, count, offset) : -1;
  }
  ssize_t Read(int fd, const iovec* parts, int count, off_t offset) override {
    return Wait() ? FileIo::Read(fd, parts, count, offset) : -1;
  }
  bool Wait() {
    ++waiting;
    while (hold) usleep(1000);
    --waiting;
    errno = error;
    return error == 0;
  }

  std::atomic<bool> hold{false};
  std::atomic<int> waiting{0};  // calls that are waiting
  std::atomic<int> error{0};
};

inline std::shared_ptr<store::BlockStore> OpenShared(const store::testing::TemporaryFolder& folder,
                                                     store::StoreOptions options = {}) {
  options.refresh_seconds = 0.01;
  return store::testing::OpenStore(folder, options);
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_STORE_RIG_H_
