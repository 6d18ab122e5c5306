// Several pools that act as one and swap sequences, with page tables and a disk that can fail for one of them.
#ifndef KVPAGE_TESTS_JOINT_SWAP_UTIL_H_
#define KVPAGE_TESTS_JOINT_SWAP_UTIL_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cache/joint_swap.h"
#include "tests/expect_ok.h"
#include "tests/faulty_io.h"
#include "tests/joint_util.h"
#include "tests/sharing_util.h"
#include "tests/store_util.h"

namespace kvpage::testing {
using store::testing::Soon;
constexpr int kDevices = 3;

// Fails or delays calls on the files of one part; each part is written and read with one call.
struct OnePartIo : store::FileIo {
  ssize_t Write(int fd, const iovec* parts, int count, off_t offset) override {
    const int call = writes++;
    while (call == held_write) usleep(1000);
    if (call == failing_write) return store::testing::FaultyIo::Fail(ENOSPC);
    return FileIo::Write(fd, parts, count, offset);
  }
  ssize_t Read(int fd, const iovec* parts, int count, off_t offset) override {
    const int call = reads++;
    while (call == held_read) usleep(1000);
    if (call == failing_read) return store::testing::FaultyIo::Fail(EIO);
    return FileIo::Read(fd, parts, count, offset);
  }
  std::atomic<int> writes{0}, reads{0};
  std::atomic<int> held_write{-1}, failing_write{-1}, held_read{-1}, failing_read{-1};
};

class JointSwapTest : public ::testing::TestWithParam<Layout> {
 protected:
  JointSwapTest() : geometry_(SmallGeometry(GetParam())), joint_(kDevices, 24 * ranges(), geometry_) {
    store::StoreOptions options;
    options.io = io_;
    options.writers = options.readers = 1;  // so that the parts are processed in order
    store_ = store::testing::OpenStore(folder_, options);
  }
  ~JointSwapTest() override {
    io_->held_write = io_->held_read = -1;
    for (const auto& pool : joint_.pools) pool->Close();
  }

  std::int64_t ranges() const { return geometry_.num_ranges(); }
  Pool* pool(int device) const { return joint_.pools[device].get(); }
  Program* program(int device) const { return joint_.programs[device].get(); }
  template <class Fn>
  void OnEach(Fn&& fn) {
    for (int i = 0; i < kDevices; ++i) fn(i);
  }
  template <class Fn>
  void AsHost(Fn&& fn) {
    joint_.joint->EnterHost();
    OnEach(fn);
    joint_.joint->LeaveHost();
  }
  // Each device has a different stamp.
  void Write(std::int32_t slot, std::int32_t tokens, float stamp) {
    OnEach([&](int i) { WriteStamped(pool(i), program(i), slot, tokens, stamp + 10 * i); });
  }
  std::int32_t Begin(std::int32_t tokens, float stamp) {
    const std::int32_t slot = joint_.Acquire(tokens);
    Write(slot, tokens, stamp);
    return slot;
  }
  void ExpectStamped(std::int32_t slot, std::int64_t begin, std::int64_t end, float stamp) {
    OnEach([&](int i) {
      EXPECT_EQ(program(i)->length(slot), program(0)->length(slot));
      EXPECT_EQ(CountStamped(pool(i), slot, begin, end, stamp + 10 * i), end - begin) << "device " << i;
    });
  }
  std::shared_ptr<JointSwap> StartOut(std::int32_t slot) {
    std::vector<SwapPtr> parts(kDevices);
    AsHost([&](int i) { EXPECT_OK(pool(i)->SwapOut(slot, store_, &parts[i])); });
    return JointSwap::Make(joint_.joint, parts);
  }
  void Vacate(std::int32_t slot) {
    OnEach([&](int i) { EXPECT_OK(program(i)->Vacate(slot)); });
  }
  std::shared_ptr<JointSwap> Out(std::int32_t slot) {
    std::shared_ptr<JointSwap> swap = StartOut(slot);
    Vacate(slot);
    return swap;
  }
  std::shared_ptr<JointSwap> OutToDisk(std::int32_t slot) {
    std::shared_ptr<JointSwap> swap = Out(slot);
    EXPECT_TRUE(Soon([&] { return swap->stored(); }));
    return swap;
  }
  void Prefetch(JointSwap* swap) {
    AsHost([&](int i) { EXPECT_OK(swap->StartRead(i).status); });
  }
  void ToMemory(JointSwap* swap) {
    Prefetch(swap);
    EXPECT_TRUE(swap->Wait(60));
  }
  // Swaps in and returns the slot.
  std::int32_t In(JointSwap* swap, bool recover = false) {
    std::vector<Claim> claims;
    AsHost([&](int i) { claims.push_back(pool(i)->SwapIn(swap->parts()[i], recover)); });
    for (int i = 0; i < kDevices; ++i) {
      EXPECT_OK(claims[i].status);
      if (!claims[i].status.ok()) return -1;
      EXPECT_EQ(claims[i].slots, claims[0].slots);
      EXPECT_EQ(claims[i].tokens, claims[0].tokens);
      EXPECT_EQ(claims[i].shared, claims[0].shared);
      RunIn(i, claims[i]);
    }
    return claims[0].slots[0];
  }
  void RunIn(int device, const Claim& claim) {
    std::vector<std::int32_t> lengths(kSlots);
    std::uint32_t epoch = 0;
    EXPECT_OK(EditOne(
        pool(device), "swap_in", program(device)->cache(),
        {static_cast<std::int32_t>(SlotOpcode::kSwapIn), claim.slots[0], static_cast<std::int32_t>(claim.tokens[0])},
        &epoch, lengths.data()));
    program(device)->Set(epoch, std::move(lengths));
  }
  std::vector<std::int64_t> Counts(int device) const {
    const PoolNumbers n = pool(device)->Numbers();
    return {n.blocks_mapped,  n.blocks_parked,     n.blocks_draining,   n.blocks_free,
            n.blocks_swapped, n.sequences_swapped, n.swaps.swapped_out, n.swaps.swapped_in};
  }
  // Expects that all pools have the same accounts and blocks, and hand out the same blocks next.
  void ExpectEqual() {
    joint_.ExpectEqual();
    OnEach([&](int i) {
      EXPECT_EQ(Counts(i), Counts(0)) << "device " << i;
      EXPECT_TRUE(AddsUp(pool(i)));
    });
  }
  void ExpectNothingLeft() {
    ExpectEqual();
    EXPECT_EQ(pool(0)->Numbers().sequences_swapped, 0);
    EXPECT_EQ(pool(0)->Numbers().blocks_swapped, 0);
    EXPECT_TRUE(Soon([&] { return store_->Numbers().bytes_swapped == 0; }));
    // If blocks had been freed in a different order, they would have different numbers here.
    if (joint_.Maps(0).size() < kSlots) {
      joint_.Acquire(100);
      joint_.ExpectEqual();
    }
  }
  SwapState StateOf(const JointSwap& swap) {
    for (const SwapPtr& part : swap.parts()) EXPECT_EQ(part->state(), swap.parts()[0]->state());
    return swap.parts()[0]->state();
  }

  const Geometry geometry_;
  const store::testing::TemporaryFolder folder_;
  const std::shared_ptr<OnePartIo> io_ = std::make_shared<OnePartIo>();
  std::shared_ptr<store::BlockStore> store_;
  JointPools joint_;
};

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_JOINT_SWAP_UTIL_H_
