// The CPU kernels' results depend only on the tokens that a row sees: not on the batch, threads, placement or other
// tokens of the sequence.
#include <gtest/gtest.h>

#include "tests/kernels_util.h"

namespace kvpage::testing {
namespace {

// The same bits regardless of neighbours, threads, chunk size and placement.
TEST(KernelsIsolationTest, BitsDoNotDependOnSurroundings) {
  Rng rng(3);
  Inline here;
  for (int round = 0; round < 10; ++round) {
    Problem p;
    p.kv_heads = 2;
    p.group = PickOf(rng, {1, 4, 7});
    p.head_dim = PickOf(rng, {40, 64, 128});
    p.dtype = kStored[round % 5];
    p.q_dtype = PickOf(rng, {IsQuantized(p.dtype) ? DType::kBF16 : p.dtype, DType::kF32});
    if (round % 2 == 1) p.window = 700;
    FillProblem(rng, p, {{2900, 1}, {30, 1}, {600, 2}, {1000, 40}, {1, 1}}, 0);
    const int n = static_cast<int>(p.sequences.size());
    const Cache home(rng, Layout::kFused, p.dtype, 2, p.head_dim, n, p.max_tokens(), 16);
    Store(p, home, Slots(n));
    std::vector<Result> expected;
    const std::vector<const char*> names = InstructionSets();
    for (const char* name : names) {
      cpu::ForceInstructionSet(name);
      expected.push_back(RunAttention(p, home, Slots(n), here));
      for (const int count : {1, 2, 5}) {
        Threads threads(count);
        EXPECT_EQ(RunAttention(p, home, Slots(n), threads), expected.back()) << count << " threads " << Describe(p);
      }
      for (int s = 0; s < n; ++s) {
        Threads threads(4);
        const Result alone = RunAttention(p, home, Slots(n), threads, s);
        const std::size_t row = p.q.size() / p.num_tokens;
        const Sequence& sequence = p.sequences[s];
        EXPECT_EQ(std::memcmp(&alone.out[sequence.query_begin * row], &expected.back().out[sequence.query_begin * row],
                              sequence.query_length * row),
                  0)
            << "sequence " << s << " alone " << Describe(p);
      }
    }
    for (const auto& [layout, chunk] : std::initializer_list<std::pair<Layout, int>>{{Layout::kFused, 48},
                                                                                     {Layout::kFused, 128},
                                                                                     {Layout::kPerLayer, 32},
                                                                                     {Layout::kPerLayer, 4096},
                                                                                     {Layout::kTableNhd, 1},
                                                                                     {Layout::kTableHnd, 7},
                                                                                     {Layout::kTableApart, 16}}) {
      const Cache away(rng, layout, p.dtype, 2, p.head_dim, n + 2, p.max_tokens(), chunk);
      std::vector<int> slots = Slots(n + 2);
      std::shuffle(slots.begin(), slots.end(), rng);
      slots.resize(n);
      Store(p, away, slots);
      for (std::size_t i = 0; i < names.size(); ++i) {
        cpu::ForceInstructionSet(names[i]);
        EXPECT_EQ(RunAttention(p, away, slots, here), expected[i])
            << "layout " << static_cast<int>(layout) << " " << chunk << " " << Describe(p);
      }
    }
  }
}

// Values of later tokens, or of tokens that have left the window, must not reach a row.
TEST(KernelsIsolationTest, UnseenNaNsStayUnseen) {
  Rng rng(4);
  Inline here;
  for (const int added : {2, 40}) {
    for (const DType dtype : kStored) {
      for (const int head_dim : {64, 72}) {
        Problem p;
        p.group = 4;
        p.head_dim = head_dim;
        p.dtype = dtype;
        p.q_dtype = IsQuantized(dtype) ? DType::kBF16 : dtype;
        p.window = 100;
        FillProblem(rng, p, {{300, added}}, 0);
        const Cache cache(rng, Layout::kFused, dtype, 1, p.head_dim, 1, p.max_tokens(), 16);
        Store(p, cache, {0});
        const std::size_t row = p.q.size() / p.num_tokens;
        for (const char* name : InstructionSets()) {
          cpu::ForceInstructionSet(name);
          Store(p, cache, {0});
          const Result clean = RunAttention(p, cache, {0}, here);
          for (int which = 0; which < 2; ++which) {
            // The last new token, and the last one that only the first row of the batch sees.
            const float bad = which == 0 ? std::nanf("") : std::numeric_limits<float>::infinity();
            for (const int token : {p.tokens(0) - 1, 300 - 100 + 1}) {
              if (IsQuantized(dtype)) {
                *cache.ScaleAt(0, token, which, 0) = bad;
              } else {
                Write(cache.At(0, token, which, 0, 3), dtype, bad);
              }
            }
          }
          const Result dirty = RunAttention(p, cache, {0}, here);
          const std::size_t seen = added == 2 ? 1 : added - 2;
          if (added > 2) {
            EXPECT_EQ(std::memcmp(&clean.out[row], &dirty.out[row], seen * row), 0) << Describe(p);
          }
          EXPECT_TRUE(std::isnan(Read(&dirty.out[0], p.q_dtype))) << Describe(p);
          EXPECT_TRUE(std::isnan(Read(&dirty.out[(added - 1) * row], p.q_dtype))) << Describe(p);
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvpage::testing
