// A CudaVmm on the fake driver, empty or with a few blocks mapped.
#ifndef KVPAGE_TESTS_CUDA_VMM_WORLD_H_
#define KVPAGE_TESTS_CUDA_VMM_WORLD_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "testing/fake_driver.h"
#include "tests/expect_ok.h"
#include "vmm/cuda_vmm.h"

namespace kvpage {

using cu::Call;
using cu::Result;

constexpr std::int64_t kBlock = 65536;
constexpr std::int64_t kPlaces = 32;

using Blocks = std::vector<std::int32_t>;

inline bool Mentions(const Status& status, const std::string& text) {
  return status.message().find(text) != std::string::npos;
}

struct World {
  explicit World(FakeDriver::Options options = DefaultOptions()) {
    EXPECT_OK(FakeDriver::Make(options, &fake));
    EXPECT_OK(CudaContext::Make(fake->driver(), 0, &context));
  }
  ~World() {
    vmm.reset();
    context.reset();
    EXPECT_TRUE(fake->Report().empty()) << fake->Report().ToString();
  }
  static FakeDriver::Options DefaultOptions() {
    FakeDriver::Options options;
    options.granularity = kBlock / 2;
    return options;
  }
  Status Make() { return CudaVmm::Make(context, kPlaces * kBlock, kBlock, &vmm); }
  Status Create(const Blocks& blocks) { return vmm->Create(blocks.data(), static_cast<std::int64_t>(blocks.size())); }
  Status Destroy(const Blocks& blocks) { return vmm->Destroy(blocks.data(), static_cast<std::int64_t>(blocks.size())); }
  Status Map(std::int64_t place, const Blocks& blocks) {
    return vmm->Map(place * kBlock, blocks.data(), static_cast<std::int64_t>(blocks.size()));
  }
  Status Unmap(std::int64_t place, const Blocks& blocks) {
    return vmm->Unmap(place * kBlock, blocks.data(), static_cast<std::int64_t>(blocks.size()));
  }
  char* At(std::int64_t place) const { return vmm->base() + place * kBlock; }

  std::unique_ptr<FakeDriver> fake;
  std::shared_ptr<CudaContext> context;
  std::unique_ptr<CudaVmm> vmm;
};

// Blocks 0 to 5 exist; 0, 2, 4 are mapped at 0, 1 and 3 at 8, and 3 again at 12. Each block holds its number.
struct Mapped : World {
  explicit Mapped(FakeDriver::Options options = DefaultOptions()) : World(options) {
    EXPECT_OK(Make());
    EXPECT_OK(vmm->Grow(16));
    EXPECT_OK(Create({0, 1, 2, 3, 4, 5}));
    EXPECT_OK(Map(0, {0, 2, 4}));
    EXPECT_OK(Map(8, {1, 3}));
    EXPECT_OK(Map(12, {3}));
    for (int i = 0; i < 3; ++i) EXPECT_OK(vmm->Fill(i * kBlock, kBlock, 2 * i));
    for (int i = 0; i < 2; ++i) EXPECT_OK(vmm->Fill((8 + i) * kBlock, kBlock, 2 * i + 1));
  }
  // Returns everything observable: the driver's accounts, and the bytes of what should be mapped.
  std::vector<std::int64_t> State() const {
    const FakeDriver::State s = fake->Report();
    std::vector<std::int64_t> state = {s.reservations,      s.handles,
                                       s.mappings,          s.streams,
                                       s.contexts,          s.pushed,
                                       s.used_bytes,        s.queued,
                                       s.violations,        s.released_while_mapped,
                                       vmm->PhysicalBytes()};
    for (int place : {0, 1, 2, 8, 9, 12}) {
      state.push_back(At(place)[0]);
      state.push_back(At(place)[kBlock - 1]);
    }
    return state;
  }
};

}  // namespace kvpage

#endif  // KVPAGE_TESTS_CUDA_VMM_WORLD_H_
