// Append (converts and scatters) and gather of keys and values.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "tests/kernels_util.h"

namespace kvpage::testing {
namespace {

TEST(AppendTest, AppendConvertsAndScatters) {
  Rng rng(9);
  std::normal_distribution<float> normal;
  const float special[] = {0.0f,        -0.0f,       1.0f,       65504.0f,    65519.9f,  65520.0f,   1e30f,
                           -1e30f,      6e-8f,       2.9e-8f,    3.1e-8f,     -1e-5f,    6.1035e-5f, 6.09e-5f,
                           1.00390625f, 1.01171875f, 1.0004883f, 1.00146484f, HUGE_VALF, -HUGE_VALF, std::nanf("")};
  Threads threads(2);
  for (const DType from : kDTypes) {
    for (const DType to : kDTypes) {
      for (const int head_dim : {64, 19}) {
        Problem p;
        p.kv_heads = 3;
        p.head_dim = head_dim;
        p.q_dtype = from;
        FillProblem(rng, p, {{5, 1}, {0, 400}, {90, 2}}, 1);
        std::vector<char> kv[2];
        const std::size_t elements = static_cast<std::size_t>(p.num_tokens) * 3 * head_dim;
        for (auto& side : kv) {
          side.resize(elements * ItemSize(from));
          for (std::size_t i = 0; i < elements; ++i) {
            const float x = i % 3 == 0 ? special[i / 3 % std::size(special)] : normal(rng);
            Write(&side[i * ItemSize(from)], from, x);
          }
        }
        for (const char* name : InstructionSets()) {
          cpu::ForceInstructionSet(name);
          for (const Layout layout : {Layout::kFused, Layout::kPerLayer, Layout::kTableNhd}) {
            const Cache cache(rng, layout, to, 3, head_dim, 3, 512, 16);
            cpu::AppendArgs args;
            args.kv = cache.view;
            args.layer = cache.layer;
            args.k = kv[0].data();
            args.v = kv[1].data();
            args.dtype = from;
            args.sequences = &p.sequences;
            cpu::Append(args, threads);
            int wrong = 0;
            for (const Sequence& s : p.sequences) {
              for (std::size_t i = 0; i < static_cast<std::size_t>(s.query_length) * 3 * head_dim * 2; ++i) {
                const int d = static_cast<int>(i % head_dim), h = static_cast<int>(i / head_dim % 3);
                const int which = static_cast<int>(i / head_dim / 3 % 2), t = static_cast<int>(i / head_dim / 6);
                const char* src =
                    &kv[which][((static_cast<std::size_t>(s.query_begin + t) * 3 + h) * head_dim + d) * ItemSize(from)];
                char expected[4];
                Write(expected, to, static_cast<float>(Read(src, from)));
                const char* got = cache.At(s.slot, s.position + t, which, h, d);
                const bool nan = std::isnan(Read(src, from)) && std::isnan(Read(got, to));
                wrong += !nan && std::memcmp(expected, got, ItemSize(to)) != 0;
              }
              EXPECT_TRUE(std::isnan(Read(cache.At(s.slot, s.position + s.query_length, 0, 0), to)));
              if (s.position > 0) {
                EXPECT_TRUE(std::isnan(Read(cache.At(s.slot, s.position - 1, 1, 2), to)));
              }
            }
            EXPECT_EQ(wrong, 0) << Name(from) << " to " << Name(to) << " " << name << " layout "
                                << static_cast<int>(layout);
          }
        }
      }
    }
  }
}

TEST(AppendTest, GatherCopiesAndClears) {
  Rng rng(10);
  Threads threads(2);
  Inline here;
  for (const Layout layout : {Layout::kFused, Layout::kPerLayer, Layout::kTableNhd, Layout::kTableHnd}) {
    Problem p;
    p.kv_heads = 2;
    p.head_dim = 24;
    p.dtype = DType::kBF16;
    FillProblem(rng, p, {{150, 3}, {0, 1}, {63, 1}}, 0);
    const Cache cache(rng, layout, p.dtype, 2, 24, 3, 200, 16);
    Store(p, cache, Slots(3));
    const std::vector<cpu::GatherArgs::Row> rows = {{2, 64}, {-1, 0}, {0, 153}, {1, 0}};
    const int tokens = 170;
    std::vector<char> out[2];
    for (Parallel* parallel : std::initializer_list<Parallel*>{&here, &threads}) {
      for (auto& side : out) side.assign(rows.size() * tokens * 2 * 24 * 2, '\x7f');
      cpu::GatherArgs args;
      args.kv = cache.view;
      args.layer = cache.layer;
      args.rows = &rows;
      args.row_tokens = tokens;
      args.k = out[0].data();
      args.v = out[1].data();
      cpu::Gather(args, *parallel);
      int wrong = 0;
      for (std::size_t i = 0; i < rows.size() * tokens * 2 * 24; ++i) {
        const int d = static_cast<int>(i % 24), h = static_cast<int>(i / 24 % 2), t = static_cast<int>(i / 48 % tokens);
        const cpu::GatherArgs::Row& row = rows[i / 48 / tokens];
        for (int which = 0; which < 2; ++which) {
          const char zero[2] = {};
          const char* expected = t < row.num_tokens ? cache.At(row.slot, t, which, h, d) : zero;
          wrong += std::memcmp(expected, &out[which][i * 2], 2) != 0;
        }
      }
      EXPECT_EQ(wrong, 0) << "layout " << static_cast<int>(layout);
    }
  }
}

}  // namespace
}  // namespace kvpage::testing
