// Sequences that have dropped their beginning: no CPU or CUDA attention kernel touches memory before the first position
// in the window, and the device's check refuses windows that reach further back.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "device/fault.h"
#include "kernels/cuda/scratch.h"
#include "tests/cuda_attention_util.h"
#include "tests/cuda_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

constexpr int kChunk = 16, kMaxTokens = 320;

// Makes the full pages of the first `chunks` chunks of some slots inaccessible during its lifetime.
class Hole {
 public:
  Hole(const Cache& cache, Layout layout, const std::vector<int>& slots, int chunks) {
    const KVView& view = cache.view;
    for (const int slot : slots) {
      if (layout == Layout::kFused) {  // each chunk holds all layers, keys and values
        Protect(view.Chunk(slot, 0, 0, 0), view.Chunk(slot, chunks, 0, 0));
        continue;
      }
      for (const int kv : {0, 1}) {
        char* const begin = view.Chunk(slot, 0, cache.layer, kv);
        Protect(begin, begin + chunks * view.chunk_stride);
      }
    }
  }
  ~Hole() {
    for (const auto& [begin, bytes] : ranges_) mprotect(begin, bytes, PROT_READ | PROT_WRITE);
  }
  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const auto& range : ranges_) sum += range.second;
    return sum;
  }

 private:
  void Protect(char* begin, char* end) {
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(begin) + page - 1) / page * page;
    const std::uintptr_t last = reinterpret_cast<std::uintptr_t>(end) / page * page;
    if (first >= last) return;
    EXPECT_EQ(mprotect(reinterpret_cast<void*>(first), last - first, PROT_NONE), 0);
    ranges_.emplace_back(reinterpret_cast<void*>(first), last - first);
  }
  std::vector<std::pair<void*, std::size_t>> ranges_;
};

TEST(CudaDroppingTest, KernelsDoNotTouchTheHole) {
  Rng rng(1);
  Threads threads(3);
  for (const DType dtype : kStored) {
    for (const Layout layout : {Layout::kFused, Layout::kPerLayer}) {
      for (const int head_dim : {64, 96}) {  // 96: the general kernels
        if (head_dim == 96 && layout == Layout::kPerLayer) continue;
        Problem p;
        p.kv_heads = 1;
        p.group = 3;
        p.head_dim = head_dim;
        p.dtype = dtype;
        p.q_dtype = IsQuantized(dtype) ? PickOf(rng, {DType::kF32, DType::kBF16}) : dtype;
        p.window = 75;
        // Decode, speculation and prefill. All of them read from position 202 on: the hole ends at 192, inside tiles
        // and spans.
        FillProblem(rng, p, {{276, 1}, {276, 3}, {276, 24}}, 0);
        const std::vector<int> slots = {2, 0, 1};
        const Cache cache(rng, layout, dtype, p.kv_heads, head_dim, 3, kMaxTokens, kChunk);
        Store(p, cache, slots);
        std::vector<double> out, lse;
        Reference(p, &out, &lse);
        const Result cpu = RunAttention(p, cache, slots, threads), device = RunCuda(p, cache, slots);
        const Hole hole(cache, layout, slots, 192 / kChunk);
        EXPECT_GT(hole.bytes(), std::size_t{1} << 14) << head_dim;
        EXPECT_EQ(RunAttention(p, cache, slots, threads), cpu);
        EXPECT_EQ(RunCuda(p, cache, slots), device);
        CheckCuda(p, device, out, lse, UsesTensorCores(p));
      }
    }
  }
}

// Attention of one token at position 99 of a slot that has dropped its first 48.
class CheckedRead {
 public:
  CheckedRead() : spec_{1, 1, 64, 2, 160, static_cast<std::int64_t>(DType::kF32), 0, kChunk} {
    p_.kv_heads = p_.group = 1;
    p_.head_dim = 64;
    FillProblem(rng_, p_, {{99, 1}}, 0);
    cache_ = std::make_unique<Cache>(rng_, Layout::kFused, p_.dtype, 1, 64, 2, 160, kChunk);
    cache_->layer = 0;
    Store(p_, *cache_, {0});
    rows_ = std::make_unique<PoolRows>(table_.Add(spec_, cache_->view, 9));
    rows_->slot(0) = {160, 0, 99, 0, 0, 48};
    rows_->written(0, 0) = 99;
  }
  // Returns the recorded fault as a message, or "" if there is none.
  std::string Run(DeviceOp op, std::int32_t window, std::int32_t length = 99) {
    Result result;
    result.out.assign(p_.q.size(), '\x55');
    result.lse.assign(1, 0.0f);
    rows_->written(0, 0) = op == DeviceOp::kPagedAttention ? 100 : 99;
    cuda::AttentionOperands operands = ToOperands(p_, *cache_, &result);
    const auto layer = Ints({0}), at = Ints({window}), slots = Ints({0}), offsets = Ints({0, 1});
    operands.layer = layer.get();
    operands.options.sliding_window = at.get();
    operands.max_context = 160;
    operands.max_slots = 2;
    const CacheBuffers buffers(9, 0, rows_->entry().epoch, {length, -1});
    const cuda::BatchOperands batch = {slots.get(), offsets.get(), 1, 1};
    const auto scratch = Exactly<char>(cuda::AttentionBytes(operands, 1, 1));
    const auto plan = Exactly<char>(cuda::PlanBytes(1));
    const std::vector<float> row(64, 1.0f);
    const cuda::AppendOperands append = {layer.get(), row.data(), row.data(), DType::kF32, 1, 64};
    std::uint32_t epoch = 0;
    if (op == DeviceOp::kAppendKV) {
      const auto check = Scratch(1, 2);
      EXPECT_OK(cuda::AppendKV(buffers.Operands(op, table_, spec_), batch, append, &epoch, check.get(), nullptr));
    } else {
      EXPECT_OK(cuda::PlanAttention(buffers.Operands(op, table_, spec_), batch, operands, plan.get(), nullptr));
      EXPECT_OK(cuda::Attend(buffers.Operands(op, table_, spec_), batch, operands,
                             op == DeviceOp::kUpdateAndAttend ? &append : nullptr, plan.get(), &epoch, scratch.get(),
                             nullptr));
    }
    const Fault fault = rows_->TakeFault();
    return fault.set == 0 ? "" : DescribeFault(fault, 9, spec_).message();
  }

 private:
  Rng rng_{3};
  const SpecInts spec_;
  Problem p_;
  DeviceTable table_;
  std::unique_ptr<Cache> cache_;
  std::unique_ptr<PoolRows> rows_;
};

TEST(CudaDroppingTest, WindowsThatShowTheHoleAreRefused) {
  CheckedRead read;
  for (const DeviceOp op : {DeviceOp::kPagedAttention, DeviceOp::kUpdateAndAttend}) {
    for (const std::int32_t window : {1, 52}) EXPECT_EQ(read.Run(op, window), "") << window;
    for (const std::int32_t window : {0, -1, 53, 100, 1 << 30}) {
      const std::int32_t first = window == 53 ? 47 : 0;
      const std::string text = read.Run(op, window);
      EXPECT_NE(text.find("position " + std::to_string(first) + " on are needed, but those below 48"),
                std::string::npos)
          << text;
    }
  }
  EXPECT_EQ(read.Run(DeviceOp::kAppendKV, 0), "") << "it reads nothing";
  EXPECT_NE(read.Run(DeviceOp::kAppendKV, 0, 47).find("position 47 on are needed"), std::string::npos);
}

}  // namespace
}  // namespace kvpage::testing
