// Decode attention of sequences that share a prefix: which spans are processed together, and that no bit of a result
// depends on it.
#include <gtest/gtest.h>

#include <map>
#include <utility>
#include <vector>

#include "kernels/cpu/plan.h"
#include "tests/kernels_util.h"

namespace kvpage::testing {
namespace {

constexpr int kChunk = 16;

// Sequences with the same first tokens, followed by `own` or somewhat more tokens of each.
struct Family {
  int members;
  int shared;
  int own;
};

// Lists the members of the families, then `others`, which share nothing.
std::vector<std::pair<int, int>> Lengths(const std::vector<Family>& families,
                                         const std::vector<std::pair<int, int>>& others, SharedPrefixes* prefixes) {
  std::vector<std::pair<int, int>> lengths;
  for (const Family& family : families) {
    for (int i = 0; i < family.members; ++i) {
      prefixes->order.push_back(static_cast<std::int32_t>(lengths.size()));
      prefixes->common.push_back(i == 0 ? 0 : family.shared);
      lengths.push_back({family.shared + family.own + 7 * (i % 5), 1 + i % 2});
    }
  }
  lengths.insert(lengths.end(), others.begin(), others.end());
  return lengths;
}

// 8 heads of 64 in float32: 2 MiB for each span of 512 tokens, so a group has at least two spans.
Problem Wide() {
  Problem p;
  p.kv_heads = 8;
  p.head_dim = 64;
  return p;
}

// Copies the shared prefixes: each of the first sequences gets the tokens of the one before it.
void CopyPrefixes(Problem& p, const SharedPrefixes& prefixes) {
  for (std::size_t s = 1; s < prefixes.order.size(); ++s) {
    for (int which = 0; which < 2; ++which) {
      std::copy_n(&p.At(static_cast<int>(s) - 1, which, 0, 0, 0), prefixes.common[s] * p.kv_heads * p.head_dim,
                  &p.At(static_cast<int>(s), which, 0, 0, 0));
    }
  }
}

// Makes the plan for sequences in a fused cache, without needing memory.
void PlanFor(Problem p, const std::vector<std::pair<int, int>>& lengths, const SharedPrefixes* prefixes, int workers,
             cpu::Plan* plan) {
  int at = 0;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    p.sequences.push_back({static_cast<std::int32_t>(s), at, lengths[s].second, lengths[s].first});
    at += lengths[s].second;
  }
  cpu::AttentionArgs args;
  args.kv.dtype = p.dtype;
  args.kv.num_kv_heads = p.kv_heads;
  args.kv.head_dim = p.head_dim;
  args.kv.token_stride = 1;
  args.kv.head_stride = kChunk;
  args.num_q_heads = p.q_heads();
  args.sequences = &p.sequences;
  args.prefixes = prefixes;
  args.options = ToOptions(p);
  cpu::MakePlan(args, workers, plan);
}

// Returns the spans processed together, summed over heads, by the number of members.
std::map<int, int> GroupedSpans(const cpu::Plan& plan) {
  std::map<int, int> spans;
  for (const cpu::WorkItem& item : plan.items) {
    if (item.num_members > 0) spans[item.num_members] += item.span_end - item.span_begin;
  }
  return spans;
}

using Spans = std::map<int, int>;

TEST(GroupedDecodeTest, ThePlanGroupsWholeSpans) {
  Problem p = Wide();
  p.group = 4;
  SharedPrefixes prefixes;
  const auto lengths = Lengths({{3, 1100, 40}, {2, 1024, 40}, {2, 1000, 40}}, {{1500, 1}, {1500, 9}}, &prefixes);
  cpu::Plan plan;
  for (const int workers : {1, 2, 4}) {
    PlanFor(p, lengths, &prefixes, workers, &plan);
    // Two spans of each head; 1000 tokens make only one full span, which is too little.
    EXPECT_EQ(GroupedSpans(plan), (Spans{{3, 2 * 8}, {2, 2 * 8}})) << workers;
    PlanFor(p, lengths, nullptr, workers, &plan);
    EXPECT_EQ(GroupedSpans(plan), Spans()) << workers;
  }
}

TEST(GroupedDecodeTest, PrefillIsNotGrouped) {
  SharedPrefixes prefixes;
  const auto lengths = Lengths({{4, 2048, 40}}, {}, &prefixes);
  auto longer = lengths;
  longer[1].second = longer[2].second = 9;
  cpu::Plan plan;
  PlanFor(Wide(), longer, &prefixes, 1, &plan);
  EXPECT_EQ(GroupedSpans(plan), (Spans{{2, 4 * 8}}));
  longer[3].second = 9;
  PlanFor(Wide(), longer, &prefixes, 1, &plan);
  EXPECT_EQ(GroupedSpans(plan), Spans());
}

TEST(GroupedDecodeTest, ManyWorkersShareAGroup) {
  SharedPrefixes prefixes;
  const auto lengths = Lengths({{70, 1024, 10}}, {}, &prefixes);
  cpu::Plan plan;
  PlanFor(Wide(), lengths, &prefixes, 1, &plan);
  // At most 32 at a time.
  EXPECT_EQ(GroupedSpans(plan), (Spans{{24, 2 * 2 * 8}, {22, 2 * 8}}));
  PlanFor(Wide(), lengths, &prefixes, 64, &plan);
  const auto groups = std::count_if(plan.items.begin(), plan.items.end(),
                                    [](const cpu::WorkItem& item) { return item.num_members > 0; });
  EXPECT_GE(groups, 2 * 64);
}

TEST(GroupedDecodeTest, GroupsWithinGroups) {
  SharedPrefixes prefixes;
  const auto lengths = Lengths({{6, 1024, 1600}}, {}, &prefixes);
  // The first three share two more spans, and two of these one more: too little.
  prefixes.common = {0, 2560, 2048, 1024, 1024, 1024};
  cpu::Plan plan;
  PlanFor(Wide(), lengths, &prefixes, 1, &plan);
  EXPECT_EQ(GroupedSpans(plan), (Spans{{6, 2 * 8}, {3, 2 * 8}}));
  // All of them share one span, which is too little, but which the first three process as part of theirs.
  prefixes.common = {0, 2048, 2048, 512, 512, 512};
  PlanFor(Wide(), lengths, &prefixes, 1, &plan);
  EXPECT_EQ(GroupedSpans(plan), (Spans{{3, 4 * 8}}));
}

// Two runs of blocks, shared by two and three sequences, and one that is not shared.
TEST(GroupedDecodeTest, PrefixesAreFoundInRuns) {
  const std::vector<std::int32_t> a = {5, 6, 7, 8}, b = {5, 6, 9}, c = {1, 6, 7}, d = {5, 6, 7, 8, 2};
  const auto run = [](const std::vector<std::int32_t>& blocks) {
    return BlockRun{blocks.data(), static_cast<std::int64_t>(blocks.size())};
  };
  SharedPrefixes found;
  FindSharedPrefixes({run(a), run(b), {}, run(c), run(d)}, 16, &found);
  EXPECT_EQ(found.order, (std::vector<std::int32_t>{3, 0, 4, 1}));
  EXPECT_EQ(found.common, (std::vector<std::int64_t>{0, 0, 64, 32}));
  FindSharedPrefixes({run(a), {}, run(c)}, 16, &found);
  EXPECT_TRUE(found.empty());
}

// Compares every sequence with the same sequence computed alone.
void ExpectSameBits(const Problem& p, const Cache& cache, const std::vector<int>& slots,
                    const SharedPrefixes* prefixes) {
  Inline here;
  const std::size_t row = p.q.size() / p.num_tokens;
  for (const char* name : InstructionSets()) {
    cpu::ForceInstructionSet(name);
    std::vector<Result> alone;
    for (std::size_t s = 0; s < slots.size(); ++s) {
      alone.push_back(RunAttention(p, cache, slots, here, static_cast<int>(s)));
    }
    for (const int count : {1, 3}) {
      Threads threads(count);
      const Result together = RunAttention(p, cache, slots, threads, -1, prefixes);
      for (std::size_t s = 0; s < slots.size(); ++s) {
        const Sequence& sequence = p.sequences[s];
        const std::size_t at = sequence.query_begin * row, size = sequence.query_length * row;
        EXPECT_EQ(std::memcmp(&alone[s].out[at], &together.out[at], size), 0)
            << "sequence " << s << " " << count << " threads " << Describe(p);
        const std::size_t lse = static_cast<std::size_t>(sequence.query_begin) * p.q_heads();
        EXPECT_EQ(std::memcmp(&alone[s].lse[lse], &together.lse[lse], 4 * sequence.query_length * p.q_heads()), 0)
            << "sequence " << s << " " << count << " threads " << Describe(p);
      }
    }
  }
}

int NumGroups(const Problem& p, const Cache& cache, const SharedPrefixes* prefixes) {
  cpu::AttentionArgs args;
  args.kv = cache.view;
  args.num_q_heads = p.q_heads();
  args.sequences = &p.sequences;
  args.prefixes = prefixes;
  args.options = ToOptions(p);
  cpu::Plan plan;
  cpu::MakePlan(args, 1, &plan);
  return static_cast<int>(plan.prefix_groups.groups.size());
}

// Two groups, sequences that share nothing, a prefill; all storage types, layouts and options.
TEST(GroupedDecodeTest, BitsAreThoseOfTheSequenceAlone) {
  Rng rng(4);
  int round = 0;
  for (const DType dtype : kStored) {
    Problem p = Wide();
    p.dtype = dtype;
    p.q_dtype = dtype == DType::kI8 ? DType::kBF16 : (dtype == DType::kF8E4M3 ? DType::kF32 : dtype);
    p.group = 2 + round % 3;
    SharedPrefixes prefixes;
    const int shared = 1024 * 4 / static_cast<int>(ItemSize(dtype)), n = 6;
    FillProblem(rng, p, Lengths({{2, shared + 90, 30}, {2, shared, 1}}, {{700, 1}, {600, 20}}, &prefixes), 1);
    CopyPrefixes(p, prefixes);
    for (const Layout layout : {Layout::kFused, Layout::kPerLayer}) {
      const Cache cache(rng, layout, dtype, p.kv_heads, p.head_dim, n, p.max_tokens(), kChunk);
      Store(p, cache, Slots(n));
      EXPECT_EQ(NumGroups(p, cache, &prefixes), 2) << Describe(p);
      p.window = round % 3 == 1 ? shared - 200 : 0;  // begins in a shared span
      p.sinks.assign(round % 2 == 1 ? p.q_heads() : 0, 0.5f);
      p.slopes.assign(round % 4 == 2 ? p.q_heads() : 0, 0.01f);
      p.soft_cap = round % 4 == 3 ? 5.0f : 0.0f;
      ExpectSameBits(p, cache, Slots(n), &prefixes);
      ++round;
    }
  }
}

// A block table shows what is shared; if values have a separate table, both must show it.
TEST(GroupedDecodeTest, TablesThatNameTheSameChunks) {
  Rng rng(5);
  for (const Layout layout : {Layout::kTableNhd, Layout::kTableHnd, Layout::kTableApart}) {
    Problem p = Wide();
    p.group = 2;
    SharedPrefixes prefixes;
    FillProblem(rng, p, Lengths({{3, 1040, 20}, {2, 1024, 20}}, {{300, 1}}, &prefixes), 0);
    CopyPrefixes(p, prefixes);
    Cache cache(rng, layout, p.dtype, p.kv_heads, p.head_dim, 6, p.max_tokens(), kChunk);
    Store(p, cache, Slots(6));
    EXPECT_EQ(NumGroups(p, cache, nullptr), 0);
    const bool apart = cache.view.values_apart();
    for (int kind = 0; kind < (apart ? 2 : 1); ++kind) {
      EXPECT_EQ(NumGroups(p, cache, nullptr), 0) << "keys alone";
      const auto row = [&](int s) {
        return cache.table.begin() + s * cache.view.table_width + kind * cache.view.table_kv_stride;
      };
      for (const int s : {1, 2}) std::copy_n(row(0), 1040 / kChunk, row(s));
      std::copy_n(row(3), 1024 / kChunk, row(4));
    }
    EXPECT_EQ(NumGroups(p, cache, nullptr), 2);
    ExpectSameBits(p, cache, Slots(6), nullptr);
  }
}

}  // namespace
}  // namespace kvpage::testing
