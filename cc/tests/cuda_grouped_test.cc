// Shared prefixes on the emulated device: decoding sequences whose first blocks are the same physical memory are
// computed together, and no bit of a result changes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/cuda/scratch.h"
#include "testing/cuda_emulation/copy_counter.h"
#include "tests/cuda_attention_util.h"
#include "tests/cuda_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

constexpr int kSpan = 256, kBlockTokens = 16;
constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

// The first `tokens` tokens of a sequence are those of an earlier one.
struct Share {
  int from = -1;
  int tokens = 0;
};

void CopyShared(Problem& p, const std::vector<Share>& shares) {
  for (std::size_t s = 0; s < shares.size(); ++s) {
    for (int which = 0; shares[s].from >= 0 && which < 2; ++which) {
      std::copy_n(&p.At(shares[s].from, which, 0, 0, 0),
                  static_cast<std::int64_t>(shares[s].tokens) * p.kv_heads * p.head_dim,
                  &p.At(static_cast<int>(s), which, 0, 0, 0));
    }
  }
}

// A random tree: each sequence starts with a prefix of an earlier one, or on its own.
std::vector<Share> RandomTree(Rng& rng, const std::vector<std::pair<int, int>>& lengths) {
  std::vector<Share> shares(lengths.size());
  for (std::size_t s = 1; s < lengths.size(); ++s) {
    if (Pick(rng, 0, 4) == 0) continue;
    const int from = Pick(rng, 0, static_cast<int>(s) - 1), most = std::min(lengths[from].first, lengths[s].first);
    shares[s] = {from, PickOf(rng, {most, Pick(rng, 0, most)}) / kBlockTokens * kBlockTokens};
  }
  return shares;
}

struct Outcome {
  Result result;
  cuda::PlanCounts plan;
  std::int64_t copied_bytes = 0;
};

// A pool on a cache whose memory cannot be mapped twice: instead, shared blocks have equal contents in all slots, and
// the runs claim that they are the same.
class SharingPool {
 public:
  SharingPool(const Problem& p, const Cache& cache, const std::vector<Share>& shares)
      : p_(p),
        cache_(cache),
        max_tokens_((p.max_tokens() + kBlockTokens - 1) / kBlockTokens * kBlockTokens),
        spec_{3, p.kv_heads, p.head_dim, Count(), max_tokens_, static_cast<std::int64_t>(p.dtype), 0, kBlockTokens},
        rows_(table_.Add(spec_, cache.view, kId)),
        width_(max_tokens_ / kBlockTokens) {
    std::int32_t next = 0;
    for (std::int64_t s = 0; s < Count(); ++s) {
      std::vector<std::int32_t> run(width_);
      for (std::int32_t& block : run) block = next++;
      const auto [from, tokens] = shares[s];
      if (from >= 0) std::copy_n(runs_.begin() + from * width_, tokens / kBlockTokens, run.begin());
      runs_.insert(runs_.end(), run.begin(), run.end());
      counts_.push_back(p.sequences[s].position / kBlockTokens);
      slots_.push_back(static_cast<std::int32_t>(s));
      offsets_.push_back(p.sequences[s].query_begin + p.sequences[s].query_length);
      lengths_.push_back(p.sequences[s].position);
      rows_.slot(s).room = static_cast<std::int32_t>(max_tokens_);
      rows_.written(s, 1) = p.tokens(s);
    }
    rows_.entry().runs = {runs_.data(), counts_.data(), width_};
  }

  PoolRows& rows() { return rows_; }
  std::vector<std::int32_t>& counts() { return counts_; }

  void Plan(std::int64_t least_saved_bytes, Result* result) {
    Arrange(least_saved_bytes, result);
    EXPECT_OK(cuda::PlanAttention(Cache(), batch_, operands_, plan_.get(), nullptr));
    EXPECT_EQ(rows_.entry().readers, 0u);
  }
  // Attends with the plan made last.
  Outcome Attend(Result result) {
    Outcome outcome;
    outcome.result = std::move(result);
    operands_.out = outcome.result.out.data();
    operands_.lse = outcome.result.lse.data();
    const std::int64_t before = emulation::NumCopiedBytes();
    EXPECT_OK(cuda::Attend(Cache(), batch_, operands_, nullptr, plan_.get(), nullptr, scratch_.get(), nullptr));
    outcome.copied_bytes = emulation::NumCopiedBytes() - before;
    outcome.plan = *reinterpret_cast<const cuda::PlanCounts*>(plan_.get());
    EXPECT_EQ(rows_.TakeFault().set, 0u);
    return outcome;
  }
  Outcome Run(std::int64_t least_saved_bytes) {
    Result result;
    Plan(least_saved_bytes, &result);
    return Attend(std::move(result));
  }

 private:
  static constexpr std::int32_t kId = 300;

  std::int64_t Count() const { return static_cast<std::int64_t>(p_.sequences.size()); }
  cuda::CacheOperands Cache() { return buffers_->Operands(DeviceOp::kPagedAttention, table_, spec_); }
  void Arrange(std::int64_t least_saved_bytes, Result* result) {
    result->out.assign(p_.q.size(), '\x55');
    result->lse.assign(static_cast<std::size_t>(p_.num_tokens) * p_.q_heads(), 12345.0f);
    operands_ = ToOperands(p_, cache_, result);
    operands_.layer = layer_.get();
    operands_.max_context = max_tokens_;
    operands_.max_slots = Count();
    operands_.least_saved_bytes = least_saved_bytes;
    batch_ = {slots_.data(), offsets_.data(), Count(), p_.num_tokens};
    buffers_ = std::make_unique<CacheBuffers>(kId, 0, rows_.entry().epoch, lengths_);
    scratch_ = Exactly<char>(cuda::AttentionBytes(operands_, Count(), p_.num_tokens));
    plan_ = Exactly<char>(cuda::PlanBytes(Count()));
    std::memset(plan_.get(), 0xa5, cuda::PlanBytes(Count()));
  }

  const Problem& p_;
  const testing::Cache& cache_;
  const std::int64_t max_tokens_;
  const SpecInts spec_;
  DeviceTable table_;
  PoolRows rows_;
  const std::int64_t width_;
  std::vector<std::int32_t> runs_, counts_, slots_, offsets_ = {0}, lengths_;
  std::unique_ptr<std::int32_t[]> layer_ = Ints({1});
  std::unique_ptr<CacheBuffers> buffers_;
  std::unique_ptr<char[]> scratch_, plan_;
  cuda::AttentionOperands operands_;
  cuda::BatchOperands batch_;
};

Problem Decode(DType dtype, int head_dim, int kv_heads, int group) {
  Problem p;
  p.dtype = p.q_dtype = dtype;
  p.head_dim = head_dim;
  p.kv_heads = kv_heads;
  p.group = group;
  return p;
}

void ExpectSameBits(const Problem& p, SharingPool& pool, bool grouped) {
  const Outcome alone = pool.Run(kNever), together = pool.Run(0);
  EXPECT_EQ(alone.plan.groups, 0);
  EXPECT_EQ(together.plan.groups > 0, grouped) << DescribeCuda(p);
  EXPECT_EQ(alone.result, together.result) << DescribeCuda(p);
  EXPECT_EQ(together.copied_bytes < alone.copied_bytes, grouped);
}

// The tiles of a shared prefix are copied once for all rows that fit.
TEST(CudaGroupedTest, SharedTilesAreCopiedOnce) {
  Rng rng(1);
  const ScopedDevice device(2, 7);
  Problem p = Decode(DType::kBF16, 64, 2, 2);
  const int shared = 2 * kSpan, n = 6;
  FillProblem(rng, p, std::vector<std::pair<int, int>>(n, {shared + 40, 1}), 0);
  const std::vector<Share> shares = {{}, {0, shared}, {0, shared}, {1, shared}, {0, shared}, {2, shared}};
  CopyShared(p, shares);
  const Cache cache(rng, Layout::kPerLayer, p.dtype, p.kv_heads, p.head_dim, n, shared + 48, kBlockTokens);
  Store(p, cache, Slots(n));
  SharingPool pool(p, cache, shares);
  const Outcome alone = pool.Run(kNever), together = pool.Run(0);
  EXPECT_EQ(together.plan.groups, 1);
  EXPECT_EQ(together.plan.group_items, 2);
  EXPECT_EQ(alone.result, together.result);
  const std::int64_t prefix = std::int64_t{2} * shared * p.kv_heads * p.head_dim * 2;  // keys and values
  EXPECT_EQ(alone.copied_bytes - together.copied_bytes, (n - 1) * prefix);
  // Grouping depends on how much it saves.
  EXPECT_EQ(pool.Run((n - 1) * prefix).plan.groups, 1);
  EXPECT_EQ(pool.Run((n - 1) * prefix + 1).plan.groups, 0);
}

TEST(CudaGroupedTest, BitsAreThoseOfTheSequenceAlone) {
  Rng rng(2);
  int grouped = 0;
  for (int round = 0; round < 16; ++round) {
    Problem p = Decode(round % 2 == 0 ? DType::kBF16 : DType::kF16, round % 8 == 7 ? 256 : (round % 3 == 0 ? 128 : 64),
                       Pick(rng, 1, 2), Pick(rng, 1, 4));
    const ScopedDevice device(Pick(rng, 1, 4), rng());
    std::vector<std::pair<int, int>> lengths;
    const int query = PickOf(rng, {1, 1, 2});
    for (int s = Pick(rng, 3, 7); s > 0; --s) lengths.emplace_back(Pick(rng, 200, 900), query);
    if (round % 4 == 1) lengths.emplace_back(Pick(rng, 0, 300), 20);  // a prefill
    FillProblem(rng, p, lengths, 0);
    const std::vector<Share> shares = RandomTree(rng, lengths);
    CopyShared(p, shares);
    AddOptions(rng, p);
    const Layout layout = round % 2 == 0 ? Layout::kFused : Layout::kPerLayer;
    const int n = static_cast<int>(lengths.size());
    const Cache cache(rng, layout, p.dtype, p.kv_heads, p.head_dim, n, p.max_tokens() + 5, kBlockTokens);
    Store(p, cache, Slots(static_cast<std::size_t>(n)));
    SharingPool pool(p, cache, shares);
    const Outcome alone = pool.Run(kNever), together = pool.Run(0);
    EXPECT_EQ(alone.result, together.result) << DescribeCuda(p);
    EXPECT_EQ(together.copied_bytes < alone.copied_bytes, together.plan.groups > 0);
    grouped += together.plan.groups > 0;
  }
  EXPECT_GT(grouped, 6);
}

// Branches share more with each other than with the first sequence; more rows than a block computes at a time.
TEST(CudaGroupedTest, GroupsWithinGroups) {
  Rng rng(3);
  const ScopedDevice device(3, 11);
  Problem p = Decode(DType::kF16, 64, 1, 8);
  FillProblem(rng, p, std::vector<std::pair<int, int>>(11, {4 * kSpan + 30, 1}), 0);
  const int one = kSpan, two = 2 * kSpan, all = 4 * kSpan;
  const std::vector<Share> shares = {{},       {0, one}, {0, one}, {1, two}, {1, two}, {2, all},
                                     {3, all}, {0, one}, {0, one}, {0, one}, {0, one}};
  CopyShared(p, shares);
  const Cache cache(rng, Layout::kFused, p.dtype, 1, p.head_dim, 11, 4 * kSpan + 48, kBlockTokens);
  Store(p, cache, Slots(11));
  SharingPool pool(p, cache, shares);
  const Outcome alone = pool.Run(kNever), together = pool.Run(0);
  EXPECT_EQ(alone.result, together.result);
  // One span for all 11 sequences, in two parts; one span of {1, 3, 4, 6}; two spans of {3, 6}; three of {2, 5}.
  EXPECT_EQ(together.plan.groups, 4);
  EXPECT_EQ(together.plan.group_items, 2 + 1 + 2 + 3);
  const std::int64_t span = std::int64_t{2} * kSpan * p.head_dim * 2;
  EXPECT_EQ(alone.copied_bytes - together.copied_bytes, (9 + 3 + 2 + 3) * span);
}

// Not grouped: a window that has passed part of the prefix, and storage types without a grouped kernel.
TEST(CudaGroupedTest, WhatIsNotGrouped) {
  Rng rng(4);
  for (const DType dtype : {DType::kBF16, DType::kF32, DType::kI8}) {
    Problem p = Decode(dtype, 64, 1, 2);
    if (dtype == DType::kI8) p.q_dtype = DType::kBF16;
    if (dtype == DType::kBF16) p.window = 500;
    FillProblem(rng, p, {{520, 1}, {530, 1}}, 0);
    const std::vector<Share> shares = {{}, {0, 512}};
    CopyShared(p, shares);
    const Cache cache(rng, Layout::kPerLayer, dtype, 1, p.head_dim, 2, 544, kBlockTokens);
    Store(p, cache, Slots(2));
    SharingPool pool(p, cache, shares);
    ExpectSameBits(p, pool, /*grouped=*/false);
    if (dtype != DType::kBF16) continue;
    p.window = 600;
    ExpectSameBits(p, pool, /*grouped=*/true);
  }
}

// Slots that have changed since the plan was made are not read together.
TEST(CudaGroupedTest, APlanOfAnEarlierTime) {
  Rng rng(5);
  Problem p = Decode(DType::kBF16, 64, 1, 2);
  FillProblem(rng, p, {{520, 1}, {530, 1}, {540, 1}}, 0);
  const std::vector<Share> shares = {{}, {0, 512}, {0, 512}};
  const Cache cache(rng, Layout::kFused, p.dtype, 1, p.head_dim, 3, 560, kBlockTokens);
  Store(p, cache, Slots(3));  // all differ, as after a truncation and new tokens
  SharingPool pool(p, cache, shares);
  const Outcome alone = pool.Run(kNever);
  Result result;
  pool.Plan(0, &result);
  pool.counts()[1] = 0;
  ++pool.rows().entry().run_cuts;
  const Outcome late = pool.Attend(std::move(result));
  EXPECT_EQ(late.plan.groups, 1);
  EXPECT_EQ(late.result, alone.result);
  // A new plan takes the change into account.
  EXPECT_EQ(pool.Run(0).plan.groups, 1) << "the two others";
  pool.counts()[2] = 0;
  EXPECT_EQ(pool.Run(0).result, alone.result);
}

// With block tables, equal entries identify the same memory.
TEST(CudaGroupedTest, TablesThatNameTheSamePages) {
  Rng rng(6);
  for (const int page : {16, 48, 512}) {
    const Layout layout = PickOf(rng, {Layout::kTableNhd, Layout::kTableHnd});
    Problem p = Decode(PickOf(rng, {DType::kBF16, DType::kF16}), 64, 2, 3);
    const int n = 4;
    FillProblem(rng, p, std::vector<std::pair<int, int>>(n, {600, 1}), 0);
    std::vector<Share> shares(n);
    for (int s = 1; s < n; ++s) shares[s] = {0, 590 / page * page};
    CopyShared(p, shares);
    Cache cache(rng, layout, p.dtype, p.kv_heads, p.head_dim, n, p.max_tokens(), page);
    for (int s = 1; s < n; ++s) {
      std::copy_n(cache.table.begin(), 590 / page, cache.table.begin() + s * cache.view.table_width);
    }
    Store(p, cache, Slots(n));
    std::vector<std::int32_t> lengths(n, 601), offsets = {0, 1, 2, 3, 4};
    std::vector<Result> results;
    std::vector<std::int64_t> copied;
    for (const std::int64_t least : {kNever, std::int64_t{0}}) {
      Result result;
      result.out.assign(p.q.size(), '\x55');
      result.lse.assign(static_cast<std::size_t>(p.num_tokens) * p.q_heads(), 12345.0f);
      cuda::AttentionOperands operands = ToOperands(p, cache, &result);
      operands.max_context = cache.view.table_width * page;
      operands.least_saved_bytes = least;
      const auto scratch = Exactly<char>(cuda::AttentionBytes(operands, n, p.num_tokens) + cuda::PlanBytes(n));
      const std::int64_t before = emulation::NumCopiedBytes();
      EXPECT_OK(cuda::AttendWithTables(cache.view, static_cast<std::int64_t>(cache.table.size()), lengths.data(),
                                       offsets.data(), n, p.num_tokens, operands, scratch.get(), nullptr));
      copied.push_back(emulation::NumCopiedBytes() - before);
      results.push_back(result);
    }
    EXPECT_EQ(results[0], results[1]);
    const int spans = 590 / page * page / kSpan;
    EXPECT_EQ(copied[0] - copied[1], std::int64_t{3} * spans * 2 * kSpan * p.kv_heads * p.head_dim * 2);
  }
}

}  // namespace
}  // namespace kvpage::testing
