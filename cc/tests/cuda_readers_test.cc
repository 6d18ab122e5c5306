// Concurrent ops on two streams of the emulated device: readers of one pool, and captures before anything else has run.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels/cuda/check.cuh"
#include "testing/cuda_emulation/kernels.h"
#include "tests/cuda_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

constexpr std::int32_t kId = 7, kTokens = 40;
constexpr std::int64_t kSequences = 600;

// A pool without memory: only checks read it.
struct Readers {
  explicit Readers(std::int64_t max_slots)
      : spec{1, 1, 16, max_slots, 64, static_cast<std::int64_t>(DType::kF32), 0, 16}, rows(table.Add(spec, {}, kId)) {
    for (std::int64_t slot = 0; slot < max_slots; ++slot) {
      rows.slot(slot).room = kTokens;
      rows.written(slot, 0) = kTokens;
    }
  }

  SpecInts spec;
  DeviceTable table;
  PoolRows rows;
};

// The check of paged_attention over some slots.
class Reader {
 public:
  Reader(Readers* pool, const std::vector<std::int32_t>& slots)
      : pool_(pool),
        cache_(kId, 0, 0, std::vector<std::int32_t>(static_cast<std::size_t>(pool->spec[3]), kTokens - 1)),
        slots_(Exactly(slots)),
        offsets_(Exactly<std::int32_t>(slots.size() + 1)),
        scratch_(Scratch(static_cast<std::int64_t>(slots.size()), pool->spec[3])),
        count_(static_cast<std::int64_t>(slots.size())) {
    std::iota(offsets_.get(), offsets_.get() + count_ + 1, 0);
  }

  void Queue() {
    const cuda::CacheOperands cache = cache_.Operands(DeviceOp::kPagedAttention, pool_->table, pool_->spec);
    const cuda::BatchOperands batch = {slots_.get(), offsets_.get(), count_, count_};
    EXPECT_OK(cuda::LaunchBatchCheck(
        cache,
        cuda::ToArgs(cache, batch, layer_.get(), nullptr, /*append=*/false, nullptr, scratch_.get(), /*followers=*/0),
        nullptr));
  }
  bool passed() const { return reinterpret_cast<const CheckedBatch*>(scratch_.get())->ok != 0; }

 private:
  Readers* const pool_;
  const CacheBuffers cache_;
  const std::unique_ptr<std::int32_t[]> slots_, offsets_, layer_ = Ints({0});
  const std::unique_ptr<char[]> scratch_;
  const std::int64_t count_;
};

emulation::Graph Capture(Reader* reader) {
  emulation::Graph graph;
  graph.Begin();
  reader->Queue();
  graph.End();
  return graph;
}

// Returns how many kernels are loaded during a capture. Runs in a child process, because a kernel is loaded only once.
int LoadsInCapture(bool load_before) {
  const pid_t child = fork();
  if (child == 0) {
    if (load_before) static_cast<void>(cuda::LoadKernels());
    Readers pool(8);
    Reader reader(&pool, {1, 2});
    static_cast<void>(Capture(&reader));
    _exit(emulation::NumLoadsInCapture());
  }
  int state = 0;
  waitpid(child, &state, 0);
  return WIFEXITED(state) ? WEXITSTATUS(state) : -1;
}

TEST(CudaReadersTest, KernelsAreLoadedBeforeTheFirstCapture) {
  EXPECT_EQ(LoadsInCapture(true), 0);
  EXPECT_EQ(LoadsInCapture(false), 1);  // still works
}

TEST(CudaReadersTest, TwoReadersOfOnePool) {
  std::vector<std::int32_t> up(kSequences), down(kSequences);
  EXPECT_OK(cuda::LoadKernels());
  for (const std::int64_t max_slots : {8192, 9000}) {  // marks in shared memory and in scratch memory
    Readers pool(max_slots);
    std::iota(up.begin(), up.end(), static_cast<std::int32_t>(max_slots - kSequences));
    std::reverse_copy(up.begin(), up.end(), down.begin());
    std::vector<std::int32_t> twice = down;
    twice[kSequences - 1] = twice[0];
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      emulation::device().seed = seed;
      Reader first(&pool, up), second(&pool, down), wrong(&pool, twice);
      emulation::Graph::LaunchTogether(Capture(&first), Capture(&second));
      EXPECT_TRUE(first.passed() && second.passed()) << max_slots << " slots, seed " << seed;
      EXPECT_EQ(pool.rows.TakeFault().kind, 0);
      emulation::Graph::LaunchTogether(Capture(&first), Capture(&wrong));
      EXPECT_TRUE(first.passed()) << max_slots << " slots, seed " << seed;
      EXPECT_FALSE(wrong.passed()) << max_slots << " slots, seed " << seed;
      EXPECT_EQ(static_cast<FaultKind>(pool.rows.TakeFault().kind), FaultKind::kSlotTwice);
    }
  }
  emulation::device().seed = 0;
}

}  // namespace
}  // namespace kvpage::testing
