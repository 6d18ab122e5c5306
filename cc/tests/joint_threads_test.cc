// Devices that run the same ops at different speeds beside a busy host. Also run under ThreadSanitizer.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "tests/joint_churn.h"
#include "tests/joint_util.h"

namespace kvpage::testing {
namespace {

void ChurnPools(int devices, int rounds, std::int64_t blocks) {
  JointPools joint(devices, blocks);
  Churn(&joint, rounds, [&](int device, const Op& op, std::vector<char>* told) {
    Program& program = *joint.programs[device];
    if (op.kind == Op::kOccupy) {
      EXPECT_OK(program.Occupy(op.slot));
    } else if (op.kind == Op::kVacate) {
      EXPECT_OK(program.Vacate(op.slot));
    }
    if (op.kind != Op::kMap) return;
    told->push_back(joint.MapOne(device, op.slot, op.tokens));
    // A program writes where it was promised room.
    const std::int32_t more = op.tokens - program.length(op.slot);
    if (told->back() != 0 && more > 0) {
      EXPECT_OK(program.Write(op.slot, more));
    }
  });
}

TEST(JointThreadsTest, TwoDevices) { ChurnPools(2, 3000, 12); }
TEST(JointThreadsTest, FourDevices) { ChurnPools(4, 2000, 12); }
TEST(JointThreadsTest, EightDevices) { ChurnPools(8, 1000, 12); }

// Host calls without a pause in between: decisions must get their turn between two of them.
TEST(JointThreadsTest, HostCallsInARow) {
  constexpr std::int32_t kDecisions = 300;
  JointPools joint(2, kDecisions + 1, SmallGeometry(Layout::kFused, 16 * (kDecisions + 1)));
  const std::int32_t slot = joint.Acquire(16);
  std::atomic<bool> stop{false};
  std::atomic<int> calls{0}, torn{0};
  std::thread host([&] {
    while (!stop) {
      joint.joint->EnterHost();
      const std::int64_t before = joint.pools[0]->Rows()[0].reserved;
      std::this_thread::yield();
      if (joint.pools[1]->Rows()[0].reserved != before) ++torn;
      joint.joint->LeaveHost();
      ++calls;
    }
  });
  while (calls == 0) std::this_thread::yield();
  const auto begin = std::chrono::steady_clock::now();
  for (std::int32_t i = 1; i <= kDecisions; ++i) {
    EXPECT_TRUE(joint.MapOne(i % 2, slot, 16 * (i + 1)));
    EXPECT_TRUE(joint.MapOne(1 - i % 2, slot, 16 * (i + 1)));
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  stop = true;
  host.join();
  const double waits = static_cast<double>(joint.joint->numbers().waits);
  EXPECT_LT(seconds.count(), 1 + 0.05 * waits) << waits << " waits in " << calls << " calls";
  EXPECT_LE(torn, 2) << "in " << calls << " calls";  // the system may have stopped the host for a long time
}

// A device whose programs never run, or stop in the middle, delays nobody.
TEST(JointThreadsTest, ADeviceThatNeverComes) {
  JointPools joint(3, 12);
  const std::int32_t slot = joint.Acquire(16);
  std::vector<std::thread> threads;
  std::vector<std::vector<char>> told(2);
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      for (std::int32_t tokens = 1; tokens <= 128; ++tokens) told[i].push_back(joint.MapOne(i, slot, tokens));
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(told[0], told[1]);
  EXPECT_EQ(joint.joint->numbers().pending, 128);
  joint.ExpectEqual();
  joint.Restart();
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(joint.MapOne(i, slot, 128));
  EXPECT_EQ(joint.joint->numbers().pending, 0);
}

}  // namespace
}  // namespace kvpage::testing
