// For tests of a pool and a store below it: sequences of one token, and a disk that is slow or fails when it is told
// to.
#ifndef KVPAGE_TESTS_STORE_RIG_H_
#define KVPAGE_TESTS_STORE_RIG_H_

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "tests/faulty_vmm.h"
#include "tests/pool_util.h"
#include "tests/sharing_util.h"
#include "tests/store_util.h"

namespace kvpage::testing {

inline std::vector<std::int32_t> Sevens(std::int64_t count, std::int32_t last = 7) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count), 7);
  ids.back() = last;
  return ids;
}

// A pool over a page table that can fail.
struct StoreRig {
  explicit StoreRig(Layout layout, std::int64_t blocks = 24) : geometry(SmallGeometry(layout)) {
    auto faulty = std::make_unique<FaultyVmm>(MakeVmm(geometry));
    vmm = faulty.get();
    pool = MakePool(geometry, blocks * geometry.num_ranges(), {}, std::move(faulty));
    program = std::make_unique<Program>(pool.get());
  }
  // A released sequence of sevens.
  void Fill(std::int32_t tokens, float stamp = 1) {
    const Claim claim = program->AcquirePrefix(Sevens(tokens));
    const auto missing = static_cast<std::int32_t>(tokens - claim.tokens[0]);
    WriteStamped(pool.get(), program.get(), claim.slots[0], missing, stamp);
    program->Release(claim.slots[0]);
  }

  const Geometry geometry;
  FaultyVmm* vmm = nullptr;
  std::shared_ptr<Pool> pool;
  std::unique_ptr<Program> program;
};

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
  std::atomic<int> waiting{0};  // calls that do
  std::atomic<int> error{0};
};

inline std::shared_ptr<store::BlockStore> OpenShared(const store::testing::TemporaryFolder& folder,
                                                     store::StoreOptions options = {}) {
  options.refresh_seconds = 0.01;
  return store::testing::OpenStore(folder, options);
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_STORE_RIG_H_
