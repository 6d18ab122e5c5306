// Threads for joint pools: each device runs the same list of ops at its own pace while the host makes random calls. All
// devices must get the same results and map the same blocks.
#ifndef KVPAGE_TESTS_JOINT_CHURN_H_
#define KVPAGE_TESTS_JOINT_CHURN_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "cache/joint_maps.h"
#include "cache/pool.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {

struct Op {
  enum Kind { kOccupy, kMap, kVacate, kEnd } kind = kEnd;
  std::int32_t slot = -1;
  std::int32_t tokens = 0;
};

// The ops of all devices, in the order in which the host queues them.
class Ops {
 public:
  // Returns the number of ops so far.
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

// `joint` is a JointPools or JointDevices. `run(device, op, told)` runs an op, and appends the result of map_slots to
// `told`.
template <class Joint, class Run>
void Churn(Joint* joint, int rounds, const Run& run) {
  const int devices = joint->size();
  Ops ops;
  const std::unique_ptr<std::atomic<std::size_t>[]> done(new std::atomic<std::size_t>[devices]);
  for (int i = 0; i < devices; ++i) done[i] = 0;
  std::vector<std::vector<char>> told(devices);
  std::vector<std::thread> threads;
  for (int device = 0; device < devices; ++device) {
    threads.emplace_back([&, device] {
      std::mt19937 random(static_cast<unsigned>(device + 1));
      Op op{Op::kOccupy, -1, 0};
      for (std::size_t i = 0; op.kind != Op::kEnd; ++i) {
        op = ops.At(i);
        if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
        run(device, op, &told[device]);
        done[device] = i + 1;
      }
    });
  }
  // The ops up to the last release: the host picks slots once all devices have run them (`settle` in Python).
  std::size_t settled = 0;
  // Makes a call on every pool, which must give the same result.
  const auto everywhere = [&](auto&& call) {
    for (int i = 0; i < devices; ++i) {
      while (done[i] < settled) std::this_thread::yield();
    }
    joint->joint->EnterHost();
    std::vector<Claim> claims;
    for (const auto& pool : joint->pools) claims.push_back(call(*pool));
    joint->joint->LeaveHost();
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
      joint->StartReleaseOf(slot);
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
  joint->ExpectEqual();
  const JointMaps::Numbers numbers = joint->joint->numbers();
  EXPECT_EQ(numbers.pending, 0);
  EXPECT_EQ(numbers.fetched, numbers.decisions * (devices - 1));
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_JOINT_CHURN_H_
