// Appending, gathering and copying on the emulated device, against plain loops over the view.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "tests/cuda_util.h"
#include "tests/expect_ok.h"
#include "tests/kernels_util.h"

namespace kvpage::testing {
namespace {

constexpr DType kFloats[] = {DType::kF32, DType::kBF16, DType::kF16};
constexpr DType kStorage[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kI8, DType::kF8E4M3};
constexpr Layout kLayouts[] = {Layout::kFused, Layout::kPerLayer};
constexpr int kMaxSlots = 6, kChunk = 16, kMaxTokens = 80;

bool Same(const char* a, const char* b, DType dtype, int n) {
  for (int d = 0; d < n; ++d) {
    const char *x = a + d * ItemSize(dtype), *y = b + d * ItemSize(dtype);
    const bool nan = std::isnan(Read(x, dtype)) && std::isnan(Read(y, dtype));
    if (!nan && std::memcmp(x, y, ItemSize(dtype)) != 0) return false;
  }
  return true;
}

// A pool on a cache provided by the test, as programs see it.
struct Bench {
  Cache cache;
  SpecInts spec;
  DeviceTable table;
  PoolRows rows;
  std::vector<std::int32_t> lengths = std::vector<std::int32_t>(kMaxSlots, -1);

  Bench(Rng& rng, Layout layout, DType dtype, int heads, int head_dim)
      : cache(rng, layout, dtype, heads, head_dim, kMaxSlots, kMaxTokens, kChunk),
        spec{3,
             heads,
             head_dim,
             kMaxSlots,
             kMaxTokens,
             static_cast<std::int64_t>(dtype),
             layout == Layout::kPerLayer,
             kChunk},
        rows(table.Add(spec, cache.view, 300)) {
    for (int slot = 0; slot < kMaxSlots; ++slot) rows.slot(slot).room = kMaxTokens;
    rows.entry().epoch = 5;
  }
  CacheBuffers Buffers() const { return {300, 0, 5, lengths}; }
  // Sets lengths; every layer of a slot counts as written up to its length.
  void SetLengths(std::vector<std::int32_t> of) {
    lengths = std::move(of);
    for (int slot = 0; slot < kMaxSlots; ++slot) {
      for (int layer = 0; layer < 3; ++layer) rows.written(slot, layer) = lengths[slot] < 0 ? 0 : lengths[slot];
    }
  }
};

struct NewTokens {
  std::vector<std::int32_t> slots, offsets;
  std::vector<float> values[2];  // the exact values of k and v
  std::unique_ptr<char[]> bytes[2];
  int tokens;

  NewTokens(Rng& rng, const Bench& bench, DType from, std::vector<std::int32_t> of, std::vector<std::int32_t> at,
            int all)
      : slots(std::move(of)), offsets(std::move(at)), tokens(all) {
    std::normal_distribution<float> normal;
    const int heads = static_cast<int>(bench.spec[1]), head_dim = static_cast<int>(bench.spec[2]);
    for (int which = 0; which < 2; ++which) {
      std::vector<char> raw;
      for (int row = 0; row < tokens * heads; ++row) {
        // Some rows are zero, tiny, huge or not finite.
        const int kind = Pick(rng, 0, 11);
        const float factor = kind == 0 ? 0.0f : kind == 1 ? 1e-39f : kind == 2 ? 2e-36f : kind == 3 ? 1e37f : 1.0f;
        const int special = kind == 4 ? Pick(rng, 0, head_dim - 1) : -1;
        for (int d = 0; d < head_dim; ++d) {
          char element[4];
          const float x = d == special ? PickOf(rng, {std::nanf(""), INFINITY, -INFINITY}) : normal(rng) * factor;
          Write(element, from, x);
          raw.insert(raw.end(), element, element + ItemSize(from));
          values[which].push_back(static_cast<float>(Read(element, from)));
        }
      }
      bytes[which] = Exactly(raw);
    }
  }
};

// The expected result of append, one element at a time.
void AppendPlainly(const Bench& bench, const NewTokens& batch, const Cache& cache) {
  const int heads = static_cast<int>(bench.spec[1]), head_dim = static_cast<int>(bench.spec[2]);
  const DType to = cache.view.dtype;
  for (std::size_t s = 0; s < batch.slots.size(); ++s) {
    const int slot = batch.slots[s];
    for (int t = batch.offsets[s]; slot >= 0 && t < batch.offsets[s + 1]; ++t) {
      const int position = bench.lengths[slot] + t - batch.offsets[s];
      for (int which = 0; which < 2; ++which) {
        for (int h = 0; h < heads; ++h) {
          const float* x = &batch.values[which][static_cast<std::size_t>(t * heads + h) * head_dim];
          if (IsQuantized(to)) {
            *cache.ScaleAt(slot, position, which, h) = QuantizeRow(cache.At(slot, position, which, h), to, x, head_dim);
            continue;
          }
          for (int d = 0; d < head_dim; ++d) Write(cache.At(slot, position, which, h, d), to, x[d]);
        }
      }
    }
  }
}

// Compares complete arenas: what should have been written was, and nothing else.
bool SameArena(const Cache& a, const Cache& b) {
  if (IsQuantized(a.view.dtype)) {
    for (std::size_t i = 0; i < a.memory.size(); ++i) {
      if (a.memory[i] == b.memory[i]) continue;
      // Only the payload of a NaN scale may differ.
      float x, y;
      std::memcpy(&x, &a.memory[i / 4 * 4], 4);
      std::memcpy(&y, &b.memory[i / 4 * 4], 4);
      if (!std::isnan(x) || !std::isnan(y)) return false;
    }
    return true;
  }
  return Same(a.memory.data(), b.memory.data(), a.view.dtype,
              static_cast<int>(a.memory.size() / ItemSize(a.view.dtype)));
}

TEST(CudaAppendTest, AppendWritesWhatPlainLoopsWrite) {
  Rng rng(1);
  for (const Layout layout : kLayouts) {
    for (const DType to : kStorage) {
      for (const DType from : kFloats) {
        for (const int head_dim : {64, 20, 19}) {
          emulation::device().seed = rng() % 3;
          const int heads = head_dim == 64 ? 2 : 3;
          Bench bench(rng, layout, to, heads, head_dim);
          bench.SetLengths({3, -1, 0, 60, 16, 79});
          Cache expected = bench.cache;
          expected.view.base = expected.memory.data();
          // An empty sequence, a masked one, padding at the end.
          const NewTokens batch(rng, bench, from, {3, 0, -1, 2, 4, 5}, {0, 5, 5, 8, 28, 29, 30}, 33);
          AppendPlainly(bench, batch, expected);
          const CacheBuffers buffers = bench.Buffers();
          const auto layer = Ints({static_cast<std::int32_t>(bench.cache.layer)});
          const auto slots = Exactly(batch.slots), offsets = Exactly(batch.offsets);
          const auto scratch = Scratch(6, 0);
          const auto epoch = Exactly<std::uint32_t>(1);
          const cuda::AppendOperands append = {layer.get(), batch.bytes[0].get(), batch.bytes[1].get(), from, heads,
                                               head_dim};
          EXPECT_OK(cuda::AppendKV(buffers.Operands(DeviceOp::kAppendKV, bench.table, bench.spec),
                                   {slots.get(), offsets.get(), 6, 33}, append, epoch.get(), scratch.get(), nullptr));
          EXPECT_EQ(bench.rows.TakeFault().kind, 0);
          EXPECT_EQ(epoch[0], 6u);
          EXPECT_TRUE(SameArena(bench.cache, expected))
              << static_cast<int>(layout) << " " << Name(from) << " to " << Name(to) << " " << head_dim;
          EXPECT_EQ(bench.rows.written(3, 1), 65);
          EXPECT_EQ(bench.rows.written(2, 1), 20);
          EXPECT_EQ(bench.rows.written(0, 1), 3);
          EXPECT_EQ(bench.rows.written(3, 0), 60);
        }
      }
    }
  }
  emulation::device().seed = 0;
}

TEST(CudaAppendTest, OneTokenEachAndNothingAtAll) {
  Rng rng(2);
  Bench bench(rng, Layout::kFused, DType::kBF16, 2, 64);
  bench.SetLengths({3, 9, 0, 60, -1, 79});
  Cache expected = bench.cache;
  expected.view.base = expected.memory.data();
  const NewTokens batch(rng, bench, DType::kBF16, {5, 0, 3, 1, 2}, {0, 1, 2, 3, 4, 5}, 5);
  AppendPlainly(bench, batch, expected);
  const auto layer = Ints({1});
  const auto slots = Exactly(batch.slots), offsets = Exactly(batch.offsets);
  const auto scratch = Scratch(5, 0);
  auto epoch = Exactly<std::uint32_t>(1);
  const cuda::AppendOperands append = {layer.get(), batch.bytes[0].get(), batch.bytes[1].get(), DType::kBF16, 2, 64};
  const CacheBuffers buffers = bench.Buffers();
  const auto operands = buffers.Operands(DeviceOp::kAppendKV, bench.table, bench.spec);
  EXPECT_OK(cuda::AppendKV(operands, {slots.get(), offsets.get(), 5, 5}, append, epoch.get(), scratch.get(), nullptr));
  EXPECT_TRUE(SameArena(bench.cache, expected));
  // Without sequences and tokens, the epoch still advances.
  buffers.epoch[0] = epoch[0];
  EXPECT_OK(cuda::AppendKV(operands, {nullptr, offsets.get(), 0, 0}, append, epoch.get(), scratch.get(), nullptr));
  EXPECT_EQ(bench.rows.TakeFault().kind, 0);
  EXPECT_EQ(epoch[0], 7u);
  EXPECT_TRUE(SameArena(bench.cache, expected));
}

TEST(CudaAppendTest, AFailedAppendWritesNothing) {
  Rng rng(3);
  Bench bench(rng, Layout::kPerLayer, DType::kF16, 2, 64);
  bench.SetLengths({3, -1, 0, 60, 16, 79});
  const std::vector<char> before = bench.cache.memory;
  const NewTokens batch(rng, bench, DType::kF32, {0, 1}, {0, 4, 6}, 6);  // slot 1 is free
  const auto layer = Ints({1});
  const auto slots = Exactly(batch.slots), offsets = Exactly(batch.offsets);
  const auto scratch = Scratch(2, 0);
  const auto epoch = Exactly<std::uint32_t>(1);
  const CacheBuffers buffers = bench.Buffers();
  EXPECT_OK(cuda::AppendKV(buffers.Operands(DeviceOp::kAppendKV, bench.table, bench.spec),
                           {slots.get(), offsets.get(), 2, 6},
                           {layer.get(), batch.bytes[0].get(), batch.bytes[1].get(), DType::kF32, 2, 64}, epoch.get(),
                           scratch.get(), nullptr));
  EXPECT_EQ(bench.rows.TakeFault().kind, static_cast<std::int32_t>(FaultKind::kSlotFree));
  EXPECT_EQ(epoch[0], 5u);
  EXPECT_EQ(bench.rows.written(0, 1), 3);
  EXPECT_EQ(bench.cache.memory, before);
}

TEST(CudaAppendTest, GatherReadsWhatPlainLoopsRead) {
  Rng rng(4);
  for (const Layout layout : kLayouts) {
    for (const DType dtype : kStorage) {
      for (const int head_dim : {64, 20, 19}) {
        emulation::device().seed = rng() % 3;
        const int heads = head_dim == 64 ? 2 : 3, row_tokens = head_dim == 64 ? kMaxTokens : 37;
        const DType out_dtype = IsQuantized(dtype) ? DType::kF32 : dtype;
        Bench bench(rng, layout, dtype, heads, head_dim);
        bench.SetLengths({3, -1, 0, 60, 16, 79});
        const std::vector<int> valid = {8, 0, 20, 61, 16, 79};
        for (int slot = 0; slot < kMaxSlots; ++slot) {
          for (int t = 0; t < valid[slot]; ++t) {
            for (int row = 0; row < 2 * heads; ++row) {
              std::vector<float> x(head_dim);
              for (float& value : x) value = std::normal_distribution<float>()(rng);
              char* to = bench.cache.At(slot, t, row % 2, row / 2);
              if (IsQuantized(dtype)) {
                *bench.cache.ScaleAt(slot, t, row % 2, row / 2) = QuantizeRow(to, dtype, x.data(), head_dim);
              } else {
                for (int d = 0; d < head_dim; ++d) Write(to + d * ItemSize(dtype), dtype, x[d]);
              }
            }
          }
          bench.rows.written(slot, 1) = valid[slot];
        }
        const auto layer = Ints({1});
        const auto slots = Ints({3, 0, -1, 2, 4});
        auto offsets = Ints({0, 1, 6, 8, 28, 28});
        const std::vector<int> slot_of = {3, 0, -1, 2, -1}, tokens = {61, 8, 0, 20, 0};
        const auto scratch = Scratch(5, 0);
        const std::size_t bytes = 5ull * row_tokens * heads * head_dim * ItemSize(out_dtype);
        std::unique_ptr<char[]> out[2] = {Exactly<char>(bytes), Exactly<char>(bytes)};
        for (const bool fails : {false, true}) {
          if (fails) offsets[0] = 1;
          for (auto& side : out) std::memset(side.get(), 0x55, bytes);
          const CacheBuffers buffers = bench.Buffers();
          EXPECT_OK(cuda::GatherContext(buffers.Operands(DeviceOp::kGatherContext, bench.table, bench.spec),
                                        {slots.get(), offsets.get(), 5, -1}, layer.get(), row_tokens, out[0].get(),
                                        out[1].get(), scratch.get(), nullptr));
          EXPECT_EQ(bench.rows.TakeFault().kind, fails ? static_cast<std::int32_t>(FaultKind::kOffsetsStart) : 0);
          int wrong = 0;
          for (std::size_t i = 0; i < bytes / ItemSize(out_dtype); ++i) {
            const int d = static_cast<int>(i % head_dim), h = static_cast<int>(i / head_dim % heads);
            const int t = static_cast<int>(i / head_dim / heads % row_tokens);
            const auto s = i / head_dim / heads / row_tokens;
            for (int which = 0; which < 2; ++which) {
              const double got = Read(&out[which][i * ItemSize(out_dtype)], out_dtype);
              double wanted = 0.0;
              if (t < tokens[s]) {
                wanted = Read(bench.cache.At(slot_of[s], t, which, h, d), dtype);
                if (IsQuantized(dtype)) {
                  wanted = static_cast<float>(wanted) * *bench.cache.ScaleAt(slot_of[s], t, which, h);
                }
              }
              wrong += fails ? !std::isnan(got) : got != wanted;
            }
          }
          EXPECT_EQ(wrong, 0) << static_cast<int>(layout) << " " << Name(dtype) << " " << head_dim << " " << fails;
        }
      }
    }
  }
  emulation::device().seed = 0;
}

TEST(CudaAppendTest, CopiesWholeBlocks) {
  Rng rng(5);
  for (const std::int64_t bytes : {16ll, 4096ll, 32768ll, 100000ll}) {
    std::vector<std::unique_ptr<char[]>> from, to;
    std::vector<cuda::BlockCopy> copies;
    for (int i = 0; i < 3; ++i) {
      from.push_back(Exactly<char>(bytes));
      to.push_back(Exactly<char>(bytes));
      for (std::int64_t j = 0; j < bytes; ++j) from[i][j] = static_cast<char>(rng());
      copies.push_back({from[i].get(), to[i].get()});
    }
    const auto list = Exactly(copies);
    EXPECT_OK(cuda::CopyBlocks(list.get(), 3, bytes, nullptr));
    for (int i = 0; i < 3; ++i) EXPECT_EQ(std::memcmp(from[i].get(), to[i].get(), bytes), 0);
  }
  EXPECT_FALSE(cuda::CopyBlocks(nullptr, 1, 24, nullptr).ok());
}

}  // namespace
}  // namespace kvpage::testing
