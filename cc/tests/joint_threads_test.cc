// Devices that run one list of ops at different paces, a host that goes on meanwhile: all are told the same, and map
// the same blocks. For ThreadSanitizer too.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <random>
#include <thread>

#include "tests/joint_util.h"

namespace kvpage::testing {
namespace {

struct Op {
  enum Kind { kOccupy, kMap, kWrite, kVacate, kEnd } kind = kEnd;
  std::int32_t slot = -1;
  std::int32_t tokens = 0;
};

// Ops in the order in which the host queues them for every device.
class Queue {
 public:
  void Push(const Op& op) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ops_.push_back(op);
    }
    changed_.notify_all();
  }
  Op At(std::size_t i) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return i < ops_.size(); });
    return ops_[i];
  }
  std::size_t size() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return ops_.size();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Op> ops_;
};

void RunDevice(JointPools* joint, int device, Queue* queue, std::atomic<std::size_t>* done, std::vector<char>* told) {
  std::mt19937 random(static_cast<unsigned>(device + 1));
  Program& program = *joint->programs[device];
  for (std::size_t i = 0;; ++i) {
    const Op op = queue->At(i);
    if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
    switch (op.kind) {
      case Op::kOccupy:
        EXPECT_OK(program.Occupy(op.slot));
        break;
      case Op::kMap:
        told->push_back(joint->MapOne(device, op.slot, op.tokens));
        // Where there is room now, the device writes. It does what it was told, as a program would.
        if (told->back() != 0 && program.length(op.slot) < op.tokens) {
          EXPECT_OK(program.Write(op.slot, op.tokens - program.length(op.slot)));
        }
        break;
      case Op::kWrite:
        break;
      case Op::kVacate:
        EXPECT_OK(program.Vacate(op.slot));
        break;
      case Op::kEnd:
        done[device] = i + 1;
        return;
    }
    done[device] = i + 1;
  }
}

void Churn(int devices, int rounds, std::int64_t blocks) {
  JointPools joint(devices, blocks);
  Queue queue;
  const std::unique_ptr<std::atomic<std::size_t>[]> done(new std::atomic<std::size_t>[devices]);
  for (int i = 0; i < devices; ++i) done[i] = 0;
  std::vector<std::vector<char>> told(devices);
  std::vector<std::thread> threads;
  for (int i = 0; i < devices; ++i) threads.emplace_back(RunDevice, &joint, i, &queue, done.get(), &told[i]);
  // What the host waits for before it chooses: that all devices have given up what was released (`settle` in Python).
  std::size_t settled = 0;
  const auto settle = [&] {
    for (int i = 0; i < devices; ++i) {
      while (done[i] < settled) std::this_thread::yield();
    }
  };
  // A call of the host's, made in every pool, with the same result.
  const auto everywhere = [&](auto&& call) {
    settle();
    joint.joint->EnterHost();
    std::vector<Claim> claims;
    for (const auto& pool : joint.pools) claims.push_back(call(*pool));
    joint.joint->LeaveHost();
    for (const Claim& claim : claims) {
      EXPECT_EQ(claim.status.code(), claims[0].status.code()) << claim.status.message();
      EXPECT_EQ(claim.slots, claims[0].slots);
    }
    return claims[0];
  };
  std::mt19937 random(7);
  std::vector<std::int32_t> live;
  for (int round = 0; round < rounds; ++round) {
    const int verb = static_cast<int>(random() % 8);
    const std::int32_t slot = live.empty() ? -1 : live[random() % live.size()];
    if (verb == 0 || slot < 0) {
      const Claim claim = everywhere([&](Pool& pool) { return pool.Acquire({16}); });
      if (!claim.status.ok()) continue;
      live.push_back(claim.slots[0]);
      queue.Push({Op::kOccupy, claim.slots[0], 0});
    } else if (verb == 1) {
      joint.StartReleaseOf(slot);
      live.erase(std::find(live.begin(), live.end(), slot));
      queue.Push({Op::kVacate, slot, 0});
      settled = queue.size();
    } else if (verb == 2) {
      const auto tokens = static_cast<std::int64_t>(random() % 128);
      everywhere([&](Pool& pool) { return pool.Extend({slot}, {tokens}); });
    } else {
      queue.Push({Op::kMap, slot, static_cast<std::int32_t>(random() % 128)});
    }
  }
  queue.Push({});
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < devices; ++i) EXPECT_EQ(told[i], told[0]) << "device " << i;
  EXPECT_NE(std::count(told[0].begin(), told[0].end(), 0), 0) << "blocks never ran out";
  joint.ExpectEqual();
  const JointMaps::Numbers numbers = joint.joint->numbers();
  EXPECT_EQ(numbers.pending, 0);
  EXPECT_EQ(numbers.fetched, numbers.decisions * (devices - 1));
}

TEST(JointThreadsTest, TwoDevices) { Churn(2, 3000, 12); }
TEST(JointThreadsTest, FourDevices) { Churn(4, 2000, 12); }
TEST(JointThreadsTest, EightDevices) { Churn(8, 1000, 12); }

// Host calls that follow each other without a pause: decisions get their turn between two of them.
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
  EXPECT_LE(torn, 2) << "in " << calls << " calls";  // where the system stopped the host for long
}

// A device whose programs never come, or which stops in the middle, delays nobody.
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
