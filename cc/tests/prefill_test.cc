// Prefill: what is particular to many query rows, whose weights may be rounded to bfloat16.
#include <cmath>
#include <string>

#include "tests/check.h"
#include "tests/kernels_util.h"

namespace kvpage::testing {
namespace {

constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};

// What rounding weights to bfloat16 costs: less than rounding the output does. Contexts of all lengths up to 600.
TEST(RoundedWeightsLoseLittle) {
  Rng rng(8);
  Inline here;
  Problem p;
  p.group = 4;
  p.head_dim = 128;
  p.dtype = p.q_dtype = DType::kBF16;
  FillProblem(rng, p, {{0, 600}}, 0);
  const Cache cache(rng, Layout::kFused, p.dtype, 1, p.head_dim, 1, p.max_tokens(), 16);
  Store(p, cache, {0});
  std::vector<double> out, lse;
  Reference(p, &out, &lse);
  const auto error = [&] {
    const Result result = Run(p, cache, {0}, here);
    double sum = 0;
    for (std::size_t i = 0; i < out.size(); ++i) sum += std::pow(Read(&result.out[i * 2], p.q_dtype) - out[i], 2);
    return std::sqrt(sum / static_cast<double>(out.size()));
  };
  cpu::ForceInstructionSet("baseline");
  const double of_output = error();
  for (const char* name : InstructionSets()) {
    cpu::ForceInstructionSet(name);
    CHECK(error() < 1.4 * of_output) << error() << "against" << of_output << name;
  }
}

// Values that are all the same come out as they are: weights are divided by the sum of what multiplied the values.
TEST(WeightsAddUpToOne) {
  Rng rng(9);
  Inline here;
  for (const DType dtype : kDTypes) {
    Problem p;
    p.group = 4;
    p.dtype = p.q_dtype = dtype;
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
      const Result result = Run(p, cache, Slots(3), here);
      double worst = 0;
      for (std::size_t i = 0; i < result.out.size(); i += ItemSize(dtype)) {
        worst = std::max(worst, std::fabs(Read(&result.out[i], dtype) - 1.0));
      }
      CHECK(worst < 2e-6) << worst << cpu::InstructionSet() << Name(dtype);
    }
  }
}

}  // namespace
}  // namespace kvpage::testing

int main(int argc, char** argv) { return kvpage::testing::RunAll(argc, argv); }
