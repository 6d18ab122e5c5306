// Devices with mirrors that run one list of ops at different paces, a host that goes on meanwhile: all are told the
// same, and map the same blocks. For ThreadSanitizer too.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <random>
#include <thread>

#include "tests/joint_devices_util.h"

namespace kvpage::testing {
namespace {

struct Op {
  enum Kind { kOccupy, kMap, kVacate, kEnd } kind = kEnd;
  std::int32_t slot = -1;
  std::int32_t tokens = 0;
};

// Ops in the order in which the host queues them for every device.
class Ops {
 public:
  std::size_t Push(const Op& op) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ops_.push_back(op);
    changed_.notify_all();
    return ops_.size();
  }
  Op At(std::size_t i) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return i < ops_.size(); });
    return ops_[i];
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Op> ops_;
};

void RunDevice(JointDevices* joint, int device, Ops* ops, std::atomic<std::size_t>* done, std::vector<char>* told) {
  std::mt19937 random(static_cast<unsigned>(device + 1));
  DeviceProgram& program = *joint->programs[device];
  for (std::size_t i = 0;; ++i) {
    const Op op = ops->At(i);
    if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
    if (op.kind == Op::kOccupy) program.Acquire(op.slot);
    if (op.kind == Op::kVacate) program.Release(op.slot);
    if (op.kind == Op::kMap) {
      told->push_back(joint->MapOne(device, op.slot, op.tokens));
      const std::int32_t more = op.tokens - program.length(op.slot);
      if (told->back() != 0 && more > 0) program.Write(op.slot, more);
    }
    // Whichever thread finds work in a stream runs it. A handler of map_slots waits for what is queued, too.
    EXPECT_OK(joint->machine.device(device)->Synchronize(joint->machine.stream(device)));
    done[device] = i + 1;
    if (op.kind == Op::kEnd) return;
  }
}

void Churn(int devices, int rounds) {
  JointDevices joint(devices, 12);
  Ops ops;
  const std::unique_ptr<std::atomic<std::size_t>[]> done(new std::atomic<std::size_t>[devices]);
  for (int i = 0; i < devices; ++i) done[i] = 0;
  std::vector<std::vector<char>> told(devices);
  std::vector<std::thread> threads;
  for (int i = 0; i < devices; ++i) threads.emplace_back(RunDevice, &joint, i, &ops, done.get(), &told[i]);
  std::size_t settled = 0;  // the ops behind the last release: the host chooses when all devices have run it
  const auto everywhere = [&](auto&& call) {
    for (int i = 0; i < devices; ++i) {
      while (done[i] < settled) std::this_thread::yield();
    }
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
      const Claim claim = everywhere([](Pool& pool) { return pool.Acquire({16}); });
      if (!claim.status.ok()) continue;
      live.push_back(claim.slots[0]);
      ops.Push({Op::kOccupy, claim.slots[0], 0});
    } else if (verb == 1) {
      joint.StartReleaseOf(slot);
      live.erase(std::find(live.begin(), live.end(), slot));
      settled = ops.Push({Op::kVacate, slot, 0});
    } else if (verb == 2) {
      const auto tokens = static_cast<std::int64_t>(random() % 128);
      everywhere([&](Pool& pool) { return pool.Extend({slot}, {tokens}); });
    } else {
      ops.Push({Op::kMap, slot, static_cast<std::int32_t>(random() % 128)});
    }
  }
  ops.Push({});
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < devices; ++i) EXPECT_EQ(told[i], told[0]) << "device " << i;
  EXPECT_NE(std::count(told[0].begin(), told[0].end(), 0), 0) << "blocks never ran out";
  joint.ExpectEqual();
  joint.ExpectNoFaults();
  const JointMaps::Numbers numbers = joint.joint->numbers();
  EXPECT_EQ(numbers.pending, 0);
  EXPECT_EQ(numbers.fetched, numbers.decisions * (devices - 1));
}

TEST(JointDeviceThreadsTest, TwoDevices) { Churn(2, 1500); }
TEST(JointDeviceThreadsTest, FourDevices) { Churn(4, 800); }

}  // namespace
}  // namespace kvpage::testing
