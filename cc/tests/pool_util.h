// Helpers for pool tests: small geometries, pools, and a cache and a batch as a program would carry them.
//
// Pools are on memfd or, if KVPAGE_TEST_FAKE_DRIVER is defined, on CudaVmm with the fake driver: the same tests are
// built twice.
#ifndef KVPAGE_TESTS_POOL_UTIL_H_
#define KVPAGE_TESTS_POOL_UTIL_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cache/pool.h"
#include "tests/expect_ok.h"
#include "tests/host_verbs.h"
#ifdef KVPAGE_TEST_FAKE_DRIVER
#include "testing/fake_driver.h"
#include "vmm/cuda_vmm.h"
#else
#include "vmm/memfd_vmm.h"
#endif

namespace kvpage::testing {

constexpr int kSlots = 4;

#ifdef KVPAGE_TEST_FAKE_DRIVER
constexpr bool kHolesAreReadable = false;

// A single driver for all tests, because it must outlive every pool.
inline FakeDriver& Fake() {
  static const std::unique_ptr<FakeDriver> fake = [] {
    FakeDriver::Options options;
    options.granularity = 4096;
    options.devices = 4;
    std::unique_ptr<FakeDriver> made;
    if (!FakeDriver::Make(options, &made).ok()) std::abort();
    return made;
  }();
  return *fake;
}

inline std::unique_ptr<Vmm> MakeVmm(const Geometry& geometry, int device = 0) {
  std::shared_ptr<CudaContext> context;
  if (!CudaContext::Make(Fake().driver(), device % 4, &context).ok()) std::abort();
  std::unique_ptr<CudaVmm> vmm;
  if (!CudaVmm::Make(context, geometry.virtual_bytes(), geometry.block_bytes, &vmm).ok()) std::abort();
  return vmm;
}

// Checks after all tests that nothing is left in the driver and that no rule was broken.
class FakeDriverIsEmpty : public ::testing::Environment {
 public:
  void TearDown() override {
    const FakeDriver::State left = Fake().Report();
    EXPECT_TRUE(left.empty()) << left.ToString();
    const ::testing::UnitTest& all = *::testing::UnitTest::GetInstance();
    EXPECT_TRUE(Fake().total_calls() > 0 || all.test_to_run_count() < all.total_test_count())
        << "the tests did not run on the fake driver";
  }
};
inline ::testing::Environment* const kFakeDriverIsEmpty = ::testing::AddGlobalTestEnvironment(new FakeDriverIsEmpty);
#else
constexpr bool kHolesAreReadable = true;

inline std::unique_ptr<Vmm> MakeVmm(const Geometry& geometry, int device = 0) {
  static_cast<void>(device);
  std::unique_ptr<MemfdVmm> vmm;
  if (!MemfdVmm::Make(geometry.virtual_bytes(), geometry.block_bytes, &vmm).ok()) std::abort();
  return vmm;
}
#endif

// Blocks of one page and 16 tokens: 2 layers x K|V x 1 head x 16 floats x 4 bytes = 256 bytes per token (fused).
inline Geometry SmallGeometry(Layout layout = Layout::kFused, std::int64_t max_seq_len = 128) {
  const std::int64_t head_dim = layout == Layout::kFused ? 16 : 64;
  Geometry geometry;
  const Status status =
      Geometry::Make({2, 1, head_dim, kSlots, max_seq_len, 0, static_cast<std::int64_t>(layout), 16}, 4096, &geometry);
  if (!status.ok()) std::abort();
  return geometry;
}

inline std::shared_ptr<Pool> MakePool(const Geometry& geometry, std::int64_t blocks, PoolOptions options = {},
                                      std::unique_ptr<Vmm> vmm = nullptr) {
  if (vmm == nullptr) vmm = MakeVmm(geometry);
  std::shared_ptr<Pool> pool;
  const Status status = Pool::Make(geometry, blocks * geometry.block_bytes, options, std::move(vmm), nullptr, &pool);
  if (!status.ok()) std::abort();
  return pool;
}

inline Status EditOne(Pool* pool, const char* op, const CacheRef& cache, const SlotEdit& edit, std::uint32_t* epoch,
                      std::int32_t* lengths) {
  PinnedSlots pinned;
  return pool->EditSlots(op, cache, {&edit, 1, nullptr, 0}, &pinned, epoch, lengths);
}

// The program's side: keeps the cache value that the last op returned.
class Program {
 public:
  explicit Program(Pool* pool) : pool_(pool) { Restart(); }

  void Restart() {
    Pool::Generation generation;
    EXPECT_OK(pool_->NewGeneration(&generation));
    generation_ = generation.generation;
    epoch_ = generation.epoch;
    lengths_ = generation.lengths;
  }
  CacheRef cache() const { return {generation_, epoch_, lengths_.data()}; }
  void SetEpoch(std::uint32_t epoch) { epoch_ = epoch; }
  // Sets the results of an op for which this class has no method.
  void Set(std::uint32_t epoch, std::vector<std::int32_t> lengths) {
    epoch_ = epoch;
    lengths_ = std::move(lengths);
  }
  std::int32_t length(std::int32_t slot) const { return lengths_[slot]; }

  // The host and device sides of acquire and release.
  std::int32_t Acquire(std::int64_t tokens) {
    const Claim claim = pool_->Acquire({tokens});
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    EXPECT_OK(Occupy(claim.slots[0]));
    return claim.slots[0];
  }
  Status Occupy(std::int32_t slot) { return Edit("acquire", SlotOpcode::kOccupy, slot); }
  Status Vacate(std::int32_t slot) { return Edit("release", SlotOpcode::kVacate, slot); }
  void Release(std::int32_t slot) {
    EXPECT_OK(StartRelease(*pool_, {slot}));
    EXPECT_OK(Vacate(slot));
  }

  // The host and device sides of a fork. -1: all committed tokens.
  std::int32_t Fork(std::int32_t donor, std::int64_t tokens = -1) {
    const Claim claim = pool_->Fork("fork", {{donor, tokens}}, {});
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    EXPECT_OK(RunFork(claim.slots[0], donor, static_cast<std::int32_t>(claim.tokens[0])));
    return claim.slots[0];
  }
  // The program of a fork: full blocks are already mapped, the rest is copied.
  Status RunFork(std::int32_t slot, std::int32_t donor, std::int32_t tokens) {
    const auto block_tokens = static_cast<std::int32_t>(pool_->geometry().block_tokens);
    const SlotEdit edit = {static_cast<std::int32_t>(SlotOpcode::kFork), slot, tokens, donor};
    const TokenCopy copy = {donor, slot, tokens - tokens % block_tokens, tokens % block_tokens};
    PinnedSlots pinned;
    Status status = pool_->EditSlots("fork", cache(), {&edit, 1, &copy, 1}, &pinned, &epoch_, lengths_.data());
    if (!status.ok()) return status;
    const KVView view = pool_->View();
    for (std::int64_t token = copy.first; token < copy.end(); ++token) {
      for (std::int64_t i = 0; i < 2 * pool_->geometry().num_layers; ++i) {
        std::memcpy(view.At(slot, token, i / 2, i % 2, 0), view.At(donor, token, i / 2, i % 2, 0),
                    static_cast<std::size_t>(view.head_dim) * sizeof(float));
      }
    }
    return {};
  }
  // The host and device sides of acquire_prefix. Returns the claim; the first slot is occupied.
  Claim AcquirePrefix(const std::vector<std::int32_t>& ids, std::int64_t tokens = 0) {
    Claim claim = pool_->AcquirePrefix({{ids, tokens}}, {});
    if (claim.status.ok()) {
      EXPECT_OK(RunPrefix(claim));
    }
    return claim;
  }
  Status RunPrefix(const Claim& claim) {
    const std::int32_t slot = claim.slots[0], donor = claim.sources[0];
    const auto found = static_cast<std::int32_t>(claim.tokens[0]);
    if (donor >= 0) return RunFork(slot, donor, found);
    return EditOne(pool_, "acquire_prefix", cache(), {static_cast<std::int32_t>(SlotOpcode::kFound), slot, found},
                   &epoch_, lengths_.data());
  }
  // The host and device sides of truncate.
  void Truncate(std::int32_t slot, std::int32_t tokens) {
    EXPECT_OK(pool_->Truncate({slot}, {tokens}).status);
    EXPECT_OK(RunTruncate(slot, tokens));
  }
  Status RunTruncate(std::int32_t slot, std::int32_t tokens) {
    const SlotEdit edit = {static_cast<std::int32_t>(SlotOpcode::kTruncate), slot, tokens};
    return EditOne(pool_, "truncate", cache(), edit, &epoch_, lengths_.data());
  }

  // The program of drop_before.
  Status RunDrop(std::int32_t slot, std::int32_t tokens) {
    const SlotEdit edit = {static_cast<std::int32_t>(SlotOpcode::kDrop), slot, tokens};
    return EditOne(pool_, "drop_before", cache(), edit, &epoch_, lengths_.data());
  }

  // Appends `count` tokens in every layer and advances.
  Status Write(std::int32_t slot, std::int32_t count) {
    for (std::int64_t layer = 0; layer < pool_->geometry().num_layers; ++layer) {
      PinnedSlots pinned;
      if (Status status = Begin(slot, count, layer, true, &pinned); !status.ok()) return status;
      epoch_ = pinned.epoch();
    }
    const std::int32_t offsets[] = {0, count};
    return pool_->Advance("advance", cache(), {&slot, 1, offsets, -1}, &epoch_, lengths_.data());
  }
  Status Begin(std::int32_t slot, std::int32_t count, std::int64_t layer, bool append, PinnedSlots* pinned) {
    const std::int32_t offsets[] = {0, count};
    return pool_->Begin(append ? "append_kv" : "paged_attention", cache(), {&slot, 1, offsets, count}, layer, append,
                        pinned);
  }
  Status Map(std::int32_t slot, std::int32_t tokens, bool* ok) {
    return pool_->MapSlots("map_slots", cache(), &slot, &tokens, 1, ok, &epoch_);
  }
  Status SetLength(std::int32_t slot, std::int32_t length) {
    return pool_->SetLengths("set_lengths", cache(), &slot, &length, 1, &epoch_, lengths_.data());
  }

 private:
  Status Edit(const char* op, SlotOpcode opcode, std::int32_t slot) {
    return EditOne(pool_, op, cache(), {static_cast<std::int32_t>(opcode), slot, 0}, &epoch_, lengths_.data());
  }

  Pool* const pool_;
  std::int32_t generation_ = 0;
  std::uint32_t epoch_ = 0;
  std::vector<std::int32_t> lengths_;
};

inline bool Mentions(const Status& status, const std::string& text) {
  return status.message().find(text) != std::string::npos;
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_POOL_UTIL_H_
