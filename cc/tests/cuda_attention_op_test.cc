// Attention as handlers launch it, on the emulated device: check, append and attention on a pool's table, and on plain
// page arrays.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "kernels/cuda/scratch.h"
#include "tests/cuda_attention_util.h"
#include "tests/cuda_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

constexpr std::int32_t kId = 300, kLayers = 3;

Problem SomeProblem(Rng& rng, DType dtype, DType q_dtype, int head_dim) {
  Problem p;
  p.kv_heads = 2;
  p.group = 3;
  p.head_dim = head_dim;
  p.dtype = dtype;
  p.q_dtype = q_dtype;
  FillProblem(rng, p, {{130, 1}, {0, 25}, {40, 2}, {0, 1}}, 0);
  for (std::vector<float>& context : p.contexts) {  // as appended
    for (float& x : context) {
      char element[4];
      Write(element, q_dtype, x);
      x = static_cast<float>(Read(element, q_dtype));
    }
  }
  return p;
}

// Memory with arbitrary contents, as XLA provides it.
std::unique_ptr<char[]> Garbage(std::size_t bytes) {
  auto memory = Exactly<char>(bytes);
  std::memset(memory.get(), 0xa5, bytes);
  return memory;
}

// A pool on the cache, with the problem's sequences in its slots.
struct Pool {
  SpecInts spec;
  DeviceTable table;
  PoolRows rows;
  std::vector<std::int32_t> slots, offsets = {0}, lengths;
  std::unique_ptr<std::int32_t[]> layer = Ints({1}), window = Ints({0});
  std::uint32_t new_epoch = 12345;

  Pool(const Problem& p, const Cache& cache, const std::vector<int>& in, int max_slots, int max_tokens)
      : spec{kLayers,    p.kv_heads,
             p.head_dim, max_slots,
             max_tokens, static_cast<std::int64_t>(p.dtype),
             0,          cache.view.tokens_per_chunk},
        rows(table.Add(spec, cache.view, kId)),
        slots(in.begin(), in.end()),
        lengths(static_cast<std::size_t>(max_slots), -1) {
    rows.entry().epoch = 5;
    for (std::size_t s = 0; s < in.size(); ++s) {
      offsets.push_back(p.sequences[s].query_begin + p.sequences[s].query_length);
      lengths[static_cast<std::size_t>(in[s])] = p.sequences[s].position;
      rows.slot(in[s]).room = max_tokens;
      rows.written(in[s], 1) = p.sequences[s].position;
    }
  }

  Result Run(const Problem& p, const Cache& cache, const cuda::AppendOperands* append) {
    Result result;
    result.out.assign(p.q.size(), '\x55');
    result.lse.assign(static_cast<std::size_t>(p.num_tokens) * p.q_heads(), 12345.0f);
    cuda::AttentionOperands operands = ToOperands(p, cache, &result);
    operands.layer = layer.get();
    operands.options.sliding_window = window.get();
    operands.max_context = spec[4];
    operands.max_slots = spec[3];
    const auto count = static_cast<std::int64_t>(slots.size());
    const auto scratch = Garbage(cuda::AttentionBytes(operands, count, p.num_tokens));
    const auto plan = Garbage(cuda::PlanBytes(count));
    const CacheBuffers buffers(kId, 0, rows.entry().epoch, lengths);
    const DeviceOp op = append != nullptr ? DeviceOp::kUpdateAndAttend : DeviceOp::kPagedAttention;
    const cuda::BatchOperands batch = {slots.data(), offsets.data(), count, p.num_tokens};
    EXPECT_OK(cuda::PlanAttention(buffers.Operands(op, table, spec), batch, operands, plan.get(), nullptr));
    EXPECT_OK(cuda::Attend(buffers.Operands(op, table, spec), batch, operands, append, plan.get(), &new_epoch,
                           scratch.get(), nullptr));
    return result;
  }
};

// The new tokens' keys and values, [num_tokens, kv_heads, head_dim].
std::vector<char> NewTokens(Problem& p, int which, DType dtype) {
  std::vector<char> rows(static_cast<std::size_t>(p.num_tokens) * p.kv_heads * p.head_dim * ItemSize(dtype));
  for (std::size_t s = 0; s < p.sequences.size(); ++s) {
    const Sequence& sequence = p.sequences[s];
    for (int i = 0; i < sequence.query_length; ++i) {
      for (int h = 0; h < p.kv_heads; ++h) {
        for (int d = 0; d < p.head_dim; ++d) {
          const std::size_t at = (static_cast<std::size_t>(sequence.query_begin + i) * p.kv_heads + h) * p.head_dim + d;
          Write(&rows[at * ItemSize(dtype)], dtype, p.At(static_cast<int>(s), which, sequence.position + i, h, d));
        }
      }
    }
  }
  return rows;
}

// Whatever values a program passes, the plan includes only what they make valid; the check refuses the batch later.
TEST(CudaAttentionOpTest, APlanLeavesOutWhatIsWrong) {
  constexpr std::int32_t kLeast = std::numeric_limits<std::int32_t>::min(), kMost = -(kLeast + 1);
  struct Case {
    std::int32_t slot, begin, end;
    int planned;
  };
  const Case cases[] = {{0, 0, 1, 1},          {0, 0, 8, 1},          {2, 3, 4, 1},        {-1, 0, 1, 0}, {3, 0, 1, 0},
                        {-5, 0, 1, 0},         {kMost, 0, 1, 0},      {kLeast, 0, 1, 0},   {1, 0, 1, 0},  {2, 0, 2, 0},
                        {0, 0, 0, 0},          {0, 5, 4, 0},          {0, -1, 1, 0},       {0, 0, 9, 0},  {0, 8, 9, 0},
                        {0, kLeast, kMost, 0}, {0, kMost, kLeast, 0}, {0, kMost, kMost, 0}};
  cuda::AttentionOperands attention;
  attention.num_q_heads = 4;
  attention.num_kv_heads = 2;
  attention.head_dim = 64;
  attention.max_context = 100;
  attention.max_slots = 3;
  const auto lengths = Ints({10, -1, 99});
  cuda::CacheOperands cache;
  cache.lengths = lengths.get();
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
    attention.kv_dtype = dtype;
    attention.q_dtype = IsQuantized(dtype) ? DType::kBF16 : dtype;
    for (const Case& c : cases) {
      const auto slots = Ints({c.slot}), offsets = Ints({c.begin, c.end});
      const auto plan = Garbage(cuda::PlanBytes(1));
      EXPECT_OK(cuda::PlanAttention(cache, {slots.get(), offsets.get(), 1, 8}, attention, plan.get(), nullptr));
      const auto& counts = *reinterpret_cast<const cuda::PlanCounts*>(plan.get());
      EXPECT_EQ(counts.decode + counts.prefill, c.planned) << c.slot << " " << c.begin << " " << c.end;
    }
  }
}

TEST(CudaAttentionOpTest, PoolsAreReadAndUpdated) {
  Rng rng(1);
  constexpr DType kTypes[][2] = {{DType::kBF16, DType::kBF16}, {DType::kF16, DType::kF16},
                                 {DType::kF32, DType::kF32},   {DType::kI8, DType::kF32},
                                 {DType::kI8, DType::kBF16},   {DType::kF8E4M3, DType::kF32},
                                 {DType::kF8E4M3, DType::kF16}};
  for (const auto& types : kTypes) {
    for (const Layout layout : {Layout::kFused, Layout::kPerLayer}) {
      Problem p = SomeProblem(rng, types[0], types[1], 64);
      const int slots = 6, max_tokens = 160;
      const Cache cache(rng, layout, p.dtype, p.kv_heads, p.head_dim, slots, max_tokens, 16);
      const std::vector<int> in = {4, 1, 0, 5};
      Store(p, cache, in);
      std::vector<double> out, lse;
      Reference(p, &out, &lse);
      const bool tensor_cores = UsesTensorCores(p);
      // Erase the new tokens, which append must write.
      for (std::size_t s = 0; s < in.size(); ++s) {
        for (int t = p.sequences[s].position; t < p.tokens(s); ++t) {
          for (int which = 0; which < 2; ++which) {
            for (int h = 0; h < p.kv_heads; ++h) {
              std::memset(cache.At(in[s], t, which, h), 0xff, static_cast<std::size_t>(p.head_dim) * ItemSize(p.dtype));
              if (IsQuantized(p.dtype)) *cache.ScaleAt(in[s], t, which, h) = std::nanf("");
            }
          }
        }
      }
      Pool pool(p, cache, in, slots, max_tokens);
      const std::vector<char> before = pool.rows.State();
      const Result unwritten = pool.Run(p, cache, nullptr);
      EXPECT_TRUE(std::isnan(Read(unwritten.out.data(), p.q_dtype)) && std::isnan(unwritten.lse[0]));
      EXPECT_EQ(pool.rows.State(), before);
      EXPECT_EQ(pool.rows.TakeFault().kind, static_cast<std::int32_t>(FaultKind::kUnwritten));

      const std::vector<char> k = NewTokens(p, 0, p.q_dtype), v = NewTokens(p, 1, p.q_dtype);
      cuda::AppendOperands append;
      append.layer = pool.layer.get();
      append.k = k.data();
      append.v = v.data();
      append.dtype = p.q_dtype;
      append.num_kv_heads = p.kv_heads;
      append.head_dim = p.head_dim;
      const Result updated = pool.Run(p, cache, &append);
      CheckCuda(p, updated, out, lse, tensor_cores, "updated");
      EXPECT_EQ(pool.new_epoch, 6u);
      EXPECT_EQ(pool.rows.written(4, 1), 131);
      EXPECT_EQ(pool.Run(p, cache, nullptr), updated) << "read again " << DescribeCuda(p);
      EXPECT_EQ(pool.rows.entry().epoch, 6u);
      EXPECT_EQ(pool.rows.TakeFault().set, 0u);

      pool.lengths[1] = -1;  // free according to the cache value
      const Result failed = pool.Run(p, cache, nullptr);
      for (std::size_t i = 0; i < failed.out.size(); i += ItemSize(p.q_dtype)) {
        EXPECT_TRUE(std::isnan(Read(&failed.out[i], p.q_dtype))) << i;
      }
    }
  }
}

// Page arrays of any page size. A sequence with an invalid length or table spoils only its own rows.
TEST(CudaAttentionOpTest, TablesOfAnyPageSize) {
  Rng rng(2);
  for (const int page : {1, 5, 16, 48, 64}) {
    for (const Layout layout : {Layout::kTableNhd, Layout::kTableHnd}) {
      const DType dtype = PickOf(rng, {DType::kBF16, DType::kF16, DType::kF32});
      Problem p = SomeProblem(rng, dtype, dtype, PickOf(rng, {64, 128}));
      const int n = static_cast<int>(p.sequences.size());
      Cache cache(rng, layout, dtype, p.kv_heads, p.head_dim, n, p.max_tokens(), page);
      Store(p, cache, Slots(static_cast<std::size_t>(n)));
      std::vector<double> out, lse;
      Reference(p, &out, &lse);
      Result result;
      result.out.assign(p.q.size(), '\x55');
      result.lse.assign(static_cast<std::size_t>(p.num_tokens) * p.q_heads(), 12345.0f);
      cuda::AttentionOperands operands = ToOperands(p, cache, &result);
      operands.max_context = cache.view.table_width * page;
      std::vector<std::int32_t> lengths, offsets = {0};
      for (int s = 0; s < n; ++s) {
        lengths.push_back(p.tokens(static_cast<std::size_t>(s)));
        offsets.push_back(p.sequences[s].query_begin + p.sequences[s].query_length);
      }
      const auto scratch = Garbage(cuda::AttentionBytes(operands, n, p.num_tokens) + cuda::PlanBytes(n));
      const auto run = [&] {
        EXPECT_OK(cuda::AttendWithTables(cache.view, static_cast<std::int64_t>(cache.table.size()), lengths.data(),
                                         offsets.data(), n, p.num_tokens, operands, scratch.get(), nullptr));
      };
      run();
      CheckCuda(p, result, out, lse, dtype != DType::kF32, "tables");
      const Result good = result;

      cache.table[static_cast<std::size_t>(2 * cache.view.table_width)] = static_cast<std::int32_t>(cache.table.size());
      lengths[3] = 0x7fffffff;
      run();
      const std::size_t row = p.q.size() / static_cast<std::size_t>(p.num_tokens);
      for (int s = 0; s < n; ++s) {
        const std::size_t at = static_cast<std::size_t>(p.sequences[s].query_begin) * row;
        if (s < 2) {
          EXPECT_EQ(
              std::memcmp(&result.out[at], &good.out[at], row * static_cast<std::size_t>(p.sequences[s].query_length)),
              0);
        } else {
          EXPECT_TRUE(std::isnan(Read(&result.out[at], dtype))) << s;
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvpage::testing
