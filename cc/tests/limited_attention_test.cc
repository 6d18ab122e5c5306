// Attention whose new tokens see up to given positions (AttentionArgs::limits), as one of several devices needs it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "tests/kernels_util.h"

namespace kvpage::testing {
namespace {

// Limits that rise in random steps up to the end of each sequence, so that many new tokens see the same.
void FillLimits(Rng& rng, Problem& p) {
  p.limits.assign(p.num_tokens, -7);  // for tokens that no sequence owns
  for (std::size_t s = 0; s < p.sequences.size(); ++s) {
    const Sequence& sequence = p.sequences[s];
    std::int32_t* const own = p.limits.data() + sequence.query_begin;
    for (int i = 0; i < sequence.query_length; ++i) own[i] = Pick(rng, 0, p.tokens(s) - 1) / 16 * 16;
    std::sort(own, own + sequence.query_length);
    own[sequence.query_length - 1] = p.tokens(s) - 1;
  }
}

void Check(Rng& rng, Problem& p, double tolerance) {
  FillLimits(rng, p);
  const Cache cache = RandomCache(rng, p, /*apart=*/true);
  const std::vector<int> slots = StoreAnywhere(rng, p, cache);
  std::vector<double> out, lse;
  Reference(p, &out, &lse);
  Threads threads(3);
  Inline here;
  for (const char* name : InstructionSets()) {
    cpu::ForceInstructionSet(name);
    const Result result = RunAttention(p, cache, slots, here);
    EXPECT_TRUE(result == RunAttention(p, cache, slots, threads)) << Describe(p);
    for (std::size_t i = 0; i < out.size(); ++i) {
      ASSERT_NEAR(Read(&result.out[i * ItemSize(p.q_dtype)], p.q_dtype), out[i], tolerance) << i << " " << Describe(p);
    }
    for (std::size_t i = 0; i < lse.size(); ++i) {
      if (std::isinf(lse[i])) {
        ASSERT_EQ(result.lse[i], -std::numeric_limits<float>::infinity());
      } else {
        ASSERT_NEAR(result.lse[i], lse[i], tolerance);
      }
    }
  }
}

TEST(LimitedAttentionTest, MatchesReference) {
  Rng rng(3);
  const std::vector<std::pair<DType, double>> kinds = {{DType::kF32, 2e-5}, {DType::kBF16, 3e-2}, {DType::kI8, 2e-2}};
  for (const auto& [dtype, tolerance] : kinds) {
    for (const int group : {1, 4}) {
      Problem p;
      p.kv_heads = 2;
      p.group = group;
      p.dtype = dtype;
      p.q_dtype = dtype == DType::kBF16 ? dtype : DType::kF32;
      // Decode, a few rows, prefill over several spans; more new tokens than keys.
      FillProblem(rng, p, {{0, 1}, {900, 1}, {700, 3}, {1200, 60}, {1, 40}}, 2);
      Check(rng, p, tolerance);
      p.sequences[4].position = 20 - 40;  // a context of 20 tokens, all of which may be seen by all 40 new ones
      Check(rng, p, tolerance);
    }
  }
}

// Limits equal to the causal rule change no bit.
TEST(LimitedAttentionTest, CausalLimitsAreTheDefault) {
  Rng rng(4);
  Problem p;
  p.group = 3;
  FillProblem(rng, p, {{700, 50}, {9, 1}, {0, 33}}, 1);
  const Cache cache = RandomCache(rng, p);
  const std::vector<int> slots = StoreAnywhere(rng, p, cache);
  Inline here;
  const Result wanted = RunAttention(p, cache, slots, here);
  p.limits.assign(p.num_tokens, 0);
  for (const Sequence& s : p.sequences) {
    for (int i = 0; i < s.query_length; ++i) p.limits[s.query_begin + i] = s.position + i;
  }
  EXPECT_TRUE(wanted == RunAttention(p, cache, slots, here));
}

}  // namespace
}  // namespace kvpage::testing
