// Helpers for tests of prefixes: a pool on a page table that can fail, and sequences of a single token id.
#ifndef KVPAGE_TESTS_PREFIX_UTIL_H_
#define KVPAGE_TESTS_PREFIX_UTIL_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "tests/faulty_vmm.h"
#include "tests/pool_util.h"
#include "tests/sharing_util.h"

namespace kvpage::testing {

// The ids that WriteStamped commits. All are the same, so any two sequences have a common prefix.
inline std::vector<std::int32_t> Sevens(std::int64_t count, std::int32_t last = 7) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count), 7);
  if (!ids.empty()) ids.back() = last;
  return ids;
}

// A pool on a page table that can fail.
struct PrefixRig {
  explicit PrefixRig(Layout layout, std::int64_t blocks = 24) : geometry(SmallGeometry(layout)) {
    auto faulty = std::make_unique<FaultyVmm>(MakeVmm(geometry));
    vmm = faulty.get();
    pool = MakePool(geometry, blocks * geometry.num_ranges(), {}, std::move(faulty));
    program = std::make_unique<Program>(pool.get());
  }
  // Writes and releases a sequence of sevens.
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

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_PREFIX_UTIL_H_
