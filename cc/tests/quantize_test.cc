// Quantized storage: the bits that append writes, and the values that gather reads.
#include <gtest/gtest.h>

#include "tests/kernels_util.h"

namespace kvpage::testing {
namespace {

constexpr DType kQuantized[] = {DType::kI8, DType::kF8E4M3};
constexpr Layout kLayouts[] = {Layout::kFused, Layout::kPerLayer, Layout::kTableNhd};

// Rows that are hard to quantize: zeros, subnormal and huge ones, exact ties, infinities and NaN.
std::vector<float> HardRow(Rng& rng, int kind, int n) {
  std::normal_distribution<float> normal;
  std::vector<float> row(n);
  for (float& x : row) x = normal(rng);
  float factor = 1.0f;
  switch (kind) {
    case 0:
      factor = 0.0f;
      break;
    case 1:
      factor = 1e-39f;
      break;
    case 2:
      factor = 2e-36f;  // scales on both sides of the smallest normal float
      break;
    case 3:
      factor = 1e37f;
      break;
    case 4:  // halves of an int8 step and of a float8 step
      for (int d = 0; d < n; ++d) row[d] = 0.5f * static_cast<float>(d % 255) - 63.5f;
      row[0] = 127.0f;
      break;
    case 5:
      for (int d = 0; d < n; ++d) row[d] = std::ldexp(static_cast<float>(17 + d % 16), -d % 24);
      row[0] = 448.0f;
      break;
    case 6:
      row[n - 1] = std::numeric_limits<float>::infinity();
      break;
    case 7:
      row[n / 2] = std::nanf("");
      break;
    case 8:
      row.assign(n, 0.0f);
      row[n - 1] = -3.0f;
      break;
    default:
      break;
  }
  for (float& x : row) x *= factor;
  return row;
}

bool SameFloat(float a, float b) { return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof(a)) == 0; }

// New keys and values in dtype `from`, and as the floats that they represent.
struct Input {
  std::vector<char> bytes[2];
  std::vector<float> values[2];

  Input(Rng& rng, DType from, int rows, int head_dim) {
    for (int which = 0; which < 2; ++which) {
      for (int r = 0; r < rows; ++r) {
        for (float x : HardRow(rng, (r + which) % 14, head_dim)) {
          char element[4];
          Write(element, from, x);
          bytes[which].insert(bytes[which].end(), element, element + ItemSize(from));
          values[which].push_back(static_cast<float>(Read(element, from)));
        }
      }
    }
  }
};

TEST(QuantizeTest, AppendWritesTheDefinedBits) {
  Rng rng(1);
  Threads threads(2);
  constexpr int kHeads = 3;
  for (const DType from : kDTypes) {
    for (const DType to : kQuantized) {
      for (const int head_dim : {64, 19, 264}) {
        Problem p;
        p.kv_heads = kHeads;
        p.head_dim = head_dim;
        p.q_dtype = from;
        FillProblem(rng, p, {{5, 1}, {0, 400}, {90, 2}}, 1);
        const Input input(rng, from, p.num_tokens * kHeads, head_dim);
        for (const char* name : InstructionSets()) {
          cpu::ForceInstructionSet(name);
          for (const Layout layout : kLayouts) {
            const Cache cache(rng, layout, to, kHeads, head_dim, 3, 512, 16);
            cpu::AppendArgs args;
            args.kv = cache.view;
            args.layer = cache.layer;
            args.k = input.bytes[0].data();
            args.v = input.bytes[1].data();
            args.dtype = from;
            args.sequences = &p.sequences;
            cpu::Append(args, threads);
            int wrong = 0;
            std::vector<char> codes(head_dim);
            for (const Sequence& s : p.sequences) {
              for (int i = 0; i < s.query_length * kHeads * 2; ++i) {
                const int which = i % 2, h = i / 2 % kHeads, t = i / 2 / kHeads;
                const std::size_t row = (static_cast<std::size_t>(s.query_begin + t) * kHeads + h) * head_dim;
                const float scale = QuantizeRow(codes.data(), to, &input.values[which][row], head_dim);
                const char* got = cache.At(s.slot, s.position + t, which, h);
                wrong += std::memcmp(codes.data(), got, head_dim) != 0;
                wrong += !SameFloat(scale, *cache.ScaleAt(s.slot, s.position + t, which, h));
              }
              EXPECT_TRUE(std::isnan(*cache.ScaleAt(s.slot, s.position + s.query_length, 0, 0)));
              if (s.position > 0) {
                EXPECT_TRUE(std::isnan(*cache.ScaleAt(s.slot, s.position - 1, 1, 2)));
              }
            }
            EXPECT_EQ(wrong, 0) << Name(from) << " to " << Name(to) << " " << head_dim << " " << name << " "
                                << static_cast<int>(layout);
          }
        }
      }
    }
  }
}

TEST(QuantizeTest, GatherDequantizes) {
  Rng rng(2);
  Threads threads(2);
  Inline here;
  constexpr int kHeads = 2, kTokens = 170;
  for (const DType dtype : kQuantized) {
    for (const Layout layout : kLayouts) {
      for (const int head_dim : {32, 13}) {
        Problem p;
        p.kv_heads = kHeads;
        p.head_dim = head_dim;
        p.dtype = dtype;
        FillProblem(rng, p, {{150, 3}, {0, 1}, {63, 1}}, 0);
        const Cache cache(rng, layout, dtype, kHeads, head_dim, 3, 200, 16);
        Store(p, cache, Slots(3));
        const std::vector<cpu::GatherArgs::Row> rows = {{2, 64}, {-1, 0}, {0, 153}, {1, 0}};
        std::vector<float> out[2];
        for (const char* name : InstructionSets()) {
          cpu::ForceInstructionSet(name);
          for (Parallel* parallel : std::initializer_list<Parallel*>{&here, &threads}) {
            for (auto& side : out) side.assign(rows.size() * kTokens * kHeads * head_dim, 7.0f);
            cpu::GatherArgs args;
            args.kv = cache.view;
            args.layer = cache.layer;
            args.rows = &rows;
            args.row_tokens = kTokens;
            args.k = out[0].data();
            args.v = out[1].data();
            cpu::Gather(args, *parallel);
            int wrong = 0;
            for (std::size_t i = 0; i < out[0].size(); ++i) {
              const int d = static_cast<int>(i % head_dim), h = static_cast<int>(i / head_dim % kHeads);
              const int t = static_cast<int>(i / head_dim / kHeads % kTokens);
              const cpu::GatherArgs::Row& row = rows[i / head_dim / kHeads / kTokens];
              for (int which = 0; which < 2; ++which) {
                float expected = 0.0f;
                if (t < row.num_tokens) {
                  const double element = Read(cache.At(row.slot, t, which, h, d), dtype);
                  expected = static_cast<float>(element) * *cache.ScaleAt(row.slot, t, which, h);
                }
                wrong += expected != out[which][i];
              }
            }
            EXPECT_EQ(wrong, 0) << Name(dtype) << " " << name << " " << static_cast<int>(layout) << " " << head_dim;
          }
        }
      }
    }
  }
}

// A token that is not finite shows in the results that see it, for its own head, and nowhere else.
TEST(QuantizeTest, RowsThatAreNotFiniteReadAsNaN) {
  Rng rng(3);
  Inline here;
  for (const DType dtype : kQuantized) {
    for (int which = 0; which < 2; ++which) {
      Problem p;
      p.kv_heads = 2;
      p.dtype = dtype;
      FillProblem(rng, p, {{199, 1}, {150, 40}}, 0);
      for (int s = 0; s < 2; ++s) p.At(s, which, 160, 1, 9) = std::numeric_limits<float>::infinity();
      const Cache cache(rng, Layout::kFused, dtype, 2, 64, 2, p.max_tokens(), 16);
      Store(p, cache, Slots(2));
      for (const char* name : InstructionSets()) {
        cpu::ForceInstructionSet(name);
        const Result result = RunAttention(p, cache, Slots(2), here);
        for (int row = 0; row < p.num_tokens * 2; ++row) {
          const int position = row < 2 ? 199 : 150 + row / 2 - 1;
          const bool nan = row % 2 == 1 && position >= 160;
          EXPECT_EQ(std::isnan(Read(&result.out[row * 64 * 4], DType::kF32)), nan)
              << name << " " << which << " " << row;
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvpage::testing
