// ReadCost, computed from reads of known cost.
#include "cache/read_cost.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>

namespace kvpage::prefix {
namespace {

// The cost on a disk with this latency and bandwidth.
double Seconds(std::int64_t bytes) { return 2e-4 + static_cast<double>(bytes) / 2e9; }

TEST(ReadCostTest, NothingIsKnownWithoutReads) {
  ReadCost cost;
  EXPECT_EQ(cost.Most(1 << 20), 0);
  cost.Add(0, 1);
  cost.Add(1, 0);
  EXPECT_EQ(cost.Most(1 << 20), 0);
}

TEST(ReadCostTest, BothPartsAreFound) {
  ReadCost cost;
  for (int i = 0; i < 20; ++i) {
    const std::int64_t bytes = std::int64_t{1} << (14 + i % 8);
    cost.Add(bytes, Seconds(bytes));
  }
  for (const std::int64_t bytes : {std::int64_t{1000}, std::int64_t{1} << 20, std::int64_t{1} << 28}) {
    EXPECT_NEAR(cost.Most(bytes) / Seconds(bytes), 1, 1e-6) << bytes;
  }
}

TEST(ReadCostTest, ReadsOfOneSizeAreNotScaledDownToNothing) {
  ReadCost cost;
  for (int i = 0; i < 5; ++i) cost.Add(1 << 20, 1e-3);
  EXPECT_NEAR(cost.Most(1 << 20), 1e-3, 1e-9);
  EXPECT_NEAR(cost.Most(2 << 20), 2e-3, 1e-9);  // at most
}

TEST(ReadCostTest, MostReadsEndInTime) {
  std::minstd_rand random(1);
  std::uniform_real_distribution<double> noise(1, 3);
  ReadCost cost;
  int in_time = 0, reads = 0;
  for (int i = 0; i < 400; ++i) {
    const std::int64_t bytes = std::int64_t{1} << (14 + random() % 10);
    const double seconds = noise(random) * Seconds(bytes);
    if (i >= 32) {
      ++reads;
      in_time += seconds <= cost.Most(bytes);
      EXPECT_LE(cost.Most(bytes), 4.5 * Seconds(bytes));
    }
    cost.Add(bytes, seconds);
  }
  EXPECT_GE(in_time, 0.8 * reads);
}

TEST(ReadCostTest, ADiskThatBecomesFasterIsNoticed) {
  ReadCost cost;
  for (int i = 0; i < 100; ++i) cost.Add(1 << (18 + i % 4), 10 * Seconds(1 << (18 + i % 4)));
  const double before = cost.Most(1 << 20);
  for (int i = 0; i < 32; ++i) cost.Add(1 << (18 + i % 4), Seconds(1 << (18 + i % 4)));
  EXPECT_NEAR(before / cost.Most(1 << 20), 10, 1e-6);
}

}  // namespace
}  // namespace kvpage::prefix
