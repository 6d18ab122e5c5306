// Properties of prefill, whose weights may be rounded to bfloat16.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tests/kernels_util.h"

namespace kvpage::testing {
namespace {

// The stored dtype, and where it makes a difference, whether weights must be exact.
struct Kind {
  DType dtype;
  bool exact_weights;
};
constexpr Kind kKinds[] = {{DType::kF32, false}, {DType::kBF16, false}, {DType::kBF16, true}, {DType::kF16, false}};

// A problem of one sequence in a cache. Measures errors relative to that of the float32 baseline, which is mostly the
// rounding of the output.
class Stored {
 public:
  Stored(Rng& rng, Problem* p) : p_(*p), cache_(rng, Layout::kFused, p->dtype, 1, p->head_dim, 1, p->max_tokens(), 16) {
    Store(p_, cache_, {0});
    std::vector<double> lse;
    Reference(p_, &out_, &lse);
    cpu::ForceInstructionSet("baseline");
    of_output_ = Error();
  }
  double RelativeError() { return Error() / of_output_; }

 private:
  double Error() {
    const Result result = RunAttention(p_, cache_, {0}, here_);
    double sum = 0;
    for (std::size_t i = 0; i < out_.size(); ++i) sum += std::pow(Read(&result.out[i * 2], p_.q_dtype) - out_[i], 2);
    return std::sqrt(sum / static_cast<double>(out_.size()));
  }

  Problem& p_;
  const Cache cache_;
  std::vector<double> out_;
  Inline here_;
  double of_output_ = 0;
};

// Rounding weights to bfloat16 costs less than rounding the output, and nothing is lost if they must be exact. Contexts
// of all lengths up to 600.
TEST(PrefillTest, RoundedWeightsLoseLittle) {
  Rng rng(8);
  Problem p;
  p.group = 4;
  p.head_dim = 128;
  p.dtype = p.q_dtype = DType::kBF16;
  FillProblem(rng, p, {{0, 600}}, 0);
  Stored stored(rng, &p);
  for (const char* name : InstructionSets()) {
    cpu::ForceInstructionSet(name);
    p.exact_weights = false;
    EXPECT_LT(stored.RelativeError(), 1.4) << stored.RelativeError() << " " << name;
    p.exact_weights = true;
    EXPECT_LT(stored.RelativeError(), 1.01) << stored.RelativeError() << " " << name << " exact";
  }
}

// A first token with nearly all of the weight and nearly no value, as in real models: the contributions of other tokens
// must be as exact as without it.
TEST(PrefillTest, ExactWeightsBesideASink) {
  Rng rng(12);
  Problem p;
  p.group = 4;
  p.head_dim = 128;
  p.dtype = p.q_dtype = DType::kBF16;
  p.exact_weights = true;
  FillProblem(rng, p, {{40, 600}}, 0);
  for (int d = 0; d < p.head_dim; ++d) {
    p.At(0, 0, 0, 0, d) = d == 0 ? 90.0f : 0.0f;
    p.At(0, 1, 0, 0, d) /= 1024.0f;
  }
  for (std::size_t i = 0; i < p.q.size(); i += p.head_dim * 2) Write(&p.q[i], p.q_dtype, 1.0f);
  Stored stored(rng, &p);
  for (const char* name : InstructionSets()) {
    cpu::ForceInstructionSet(name);
    EXPECT_LT(stored.RelativeError(), 1.02) << stored.RelativeError() << " " << name;
  }
}

// Tiny and huge values, and values that round up to the next power of two as bytes.
TEST(PrefillTest, ExactWeightsOfValuesOfAnySize) {
  Rng rng(13);
  const float largest_mantissa = 255.0f / 128;
  for (const int exponent : {-90, -60, 0, 60, 110}) {
    for (const bool rounds_up : {false, true}) {
      Problem p;
      p.group = 4;
      p.head_dim = 64;
      p.dtype = p.q_dtype = DType::kBF16;
      p.exact_weights = true;
      FillProblem(rng, p, {{40, 100}}, 0);
      for (int t = 0; t < p.tokens(0); ++t) {
        for (int d = 0; d < p.head_dim; ++d) {
          float& v = p.At(0, 1, t, 0, d);
          v = std::ldexp(rounds_up ? std::copysign(largest_mantissa, v) : std::clamp(v, -1.9f, 1.9f), exponent);
        }
      }
      Stored stored(rng, &p);
      for (const char* name : InstructionSets()) {
        cpu::ForceInstructionSet(name);
        EXPECT_LT(stored.RelativeError(), 1.02)
            << stored.RelativeError() << " " << exponent << " " << rounds_up << " " << name;
      }
    }
  }
}

// If all values are equal, they come out unchanged: weights are divided by the sum of the factors of the values.
TEST(PrefillTest, WeightsAddUpToOne) {
  Rng rng(9);
  Inline here;
  for (const auto& [dtype, exact_weights] : kKinds) {
    Problem p;
    p.group = 4;
    p.dtype = p.q_dtype = dtype;
    p.exact_weights = exact_weights;
    FillProblem(rng, p, {{0, 40}, {700, 20}, {5, 1}}, 0);
    for (int s = 0; s < 3; ++s) {
      for (int t = 0; t < p.tokens(s); ++t) {
        for (int d = 0; d < p.head_dim; ++d) p.At(s, 1, t, 0, d) = 1.0f;
      }
    }
    const Cache cache(rng, Layout::kFused, dtype, 1, p.head_dim, 3, p.max_tokens(), 16);
    Store(p, cache, Slots(3));
    for (const char* name : InstructionSets()) {
      cpu::ForceInstructionSet(name);
      const Result result = RunAttention(p, cache, Slots(3), here);
      double worst = 0;
      for (std::size_t i = 0; i < result.out.size(); i += ItemSize(dtype)) {
        worst = std::max(worst, std::fabs(Read(&result.out[i], dtype) - 1.0));
      }
      EXPECT_LT(worst, 2e-6) << worst << " " << cpu::InstructionSet() << " " << Name(dtype);
    }
  }
}

// Prompts of several tiles and units, alone and with others, with any number of threads.
TEST(PrefillTest, BitsDoNotDependOnUnits) {
  Rng rng(10);
  Inline here;
  for (const auto& [dtype, exact_weights] : kKinds) {
    for (const int window : {0, 150}) {
      Problem p;
      p.group = 4;
      p.dtype = p.q_dtype = dtype;
      p.exact_weights = exact_weights;
      p.window = window;
      FillProblem(rng, p, {{0, 700}, {2000, 110}, {300, 1}}, 0);
      const Cache cache(rng, Layout::kFused, dtype, 1, p.head_dim, 3, p.max_tokens(), 16);
      Store(p, cache, Slots(3));
      for (const char* name : InstructionSets()) {
        cpu::ForceInstructionSet(name);
        const Result expected = RunAttention(p, cache, Slots(3), here);
        for (const int count : {2, 7, 64}) {
          Threads threads(count);
          EXPECT_EQ(RunAttention(p, cache, Slots(3), threads), expected)
              << count << " threads " << name << " " << Name(dtype);
          for (int s = 0; s < 3; ++s) {
            const Result alone = RunAttention(p, cache, Slots(3), threads, s);
            const std::size_t row = p.q.size() / p.num_tokens, at = p.sequences[s].query_begin * row;
            EXPECT_EQ(std::memcmp(&alone.out[at], &expected.out[at], p.sequences[s].query_length * row), 0)
                << "sequence " << s << " alone, " << count << " threads " << name << " " << Name(dtype);
          }
        }
      }
    }
  }
}

// The values of the last token, of any size, change no bit of other tokens' results.
TEST(PrefillTest, LaterValuesChangeNoBit) {
  Rng rng(14);
  Inline here;
  for (const auto& [dtype, exact_weights] : kKinds) {
    Problem p;
    p.group = 4;
    p.dtype = p.q_dtype = dtype;
    p.exact_weights = exact_weights;
    FillProblem(rng, p, {{30, 70}}, 0);
    const Cache cache(rng, Layout::kFused, dtype, 1, p.head_dim, 1, p.max_tokens(), 16);
    Store(p, cache, {0});
    const std::size_t others = p.q.size() / p.num_tokens * 69;
    for (const char* name : InstructionSets()) {
      cpu::ForceInstructionSet(name);
      const Result before = RunAttention(p, cache, {0}, here);
      for (const float value : {HUGE_VALF, -HUGE_VALF, 65504.0f, 0.0f, 1e-7f}) {
        for (int d = 0; d < p.head_dim; ++d) Write(cache.At(0, 99, 1, 0, d), dtype, value);
        const Result after = RunAttention(p, cache, {0}, here);
        EXPECT_EQ(std::memcmp(&after.out[0], &before.out[0], others), 0)
            << value << " " << name << " " << Name(dtype) << " " << exact_weights;
      }
      Store(p, cache, {0});
    }
  }
}

// A NaN with any bits reaches the rows that see it; other rows do not change a bit.
TEST(PrefillTest, NaNsOfAllBitsAreSeen) {
  Rng rng(11);
  Inline here;
  struct Shape {
    int before, added, window;
  };
  for (const Shape shape : {Shape{0, 60, 0}, Shape{3, 60, 9}, Shape{64, 6, 2}, Shape{64, 80, 2}}) {
    for (const auto& [dtype, exact_weights] : kKinds) {
      Problem p;
      p.group = 4;
      p.dtype = p.q_dtype = dtype;
      p.exact_weights = exact_weights;
      p.window = shape.window;
      FillProblem(rng, p, {{shape.before, shape.added}}, 0);
      const Cache cache(rng, Layout::kFused, dtype, 1, p.head_dim, 1, p.max_tokens(), 16);
      const std::size_t row = p.q.size() / p.num_tokens;
      for (const char* name : InstructionSets()) {
        cpu::ForceInstructionSet(name);
        for (const int token : {shape.before - 1, shape.before + 1, shape.before + shape.added - 2}) {
          for (const int which : {0, 1}) {
            if (token < 0) continue;
            Store(p, cache, {0});
            const Result clean = RunAttention(p, cache, {0}, here);
            std::memset(cache.At(0, token, which, 0, 5), 0xff, ItemSize(dtype));
            const Result dirty = RunAttention(p, cache, {0}, here);
            for (int t = 0; t < shape.added; ++t) {
              const int position = shape.before + t;
              if (position >= token && (shape.window == 0 || position < token + shape.window)) {
                EXPECT_TRUE(std::isnan(Read(&dirty.out[t * row + 5 * ItemSize(dtype)], dtype)))
                    << position << " " << token << " " << which << " " << name;
              } else {
                EXPECT_EQ(std::memcmp(&dirty.out[t * row], &clean.out[t * row], row), 0)
                    << position << " " << token << " " << which << " " << name;
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvpage::testing
