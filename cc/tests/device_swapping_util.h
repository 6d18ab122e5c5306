// A pool on the emulated device with a store in host memory, and a program that uses the CUDA kernels.
#ifndef KVPAGE_TESTS_DEVICE_SWAPPING_UTIL_H_
#define KVPAGE_TESTS_DEVICE_SWAPPING_UTIL_H_

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cuda/kernels.h"
#include "store/host_store.h"
#include "tests/device_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {

using kvpage::Layout;

template <class Condition>
bool Soon(const Condition& condition) {
  for (int i = 0; i < 20000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

inline Geometry GeometryOf(Layout layout) {
  Geometry geometry;
  const std::int64_t head_dim = layout == Layout::kFused ? 16 : 64;
  if (!Geometry::Make({kLayers, 1, head_dim, kSlots, 128, 0, static_cast<std::int64_t>(layout), 16}, 4096, &geometry)
           .ok()) {
    std::abort();
  }
  return geometry;
}

// A machine with a pool, a store and a program, whose CUDA kernels run synchronously inside the call.
class SwappingRig {
 public:
  explicit SwappingRig(Layout layout, std::int64_t store_blocks = 64, std::int64_t blocks = 20)
      : SwappingRig(layout, std::make_shared<Machine>(), 300, store_blocks, blocks) {}
  // Makes a pool with this id next to others on the machine.
  SwappingRig(Layout layout, std::shared_ptr<Machine> machine, std::int32_t id, std::int64_t store_blocks = 64,
              std::int64_t blocks = 20)
      : geometry_(GeometryOf(layout)), machine_(std::move(machine)) {
    EXPECT_OK(machine_->Open(id, geometry_, blocks * ranges(), &pool_));
    store_ = std::make_shared<store::HostStore>(store_blocks * ranges() * geometry_.block_bytes);
    handle_[0] = id;
    Restart();
  }
  ~SwappingRig() {
    pool_->Close();
    pool_.reset();
    store_->Close();
  }

  Machine& machine() { return *machine_; }
  FakeDriver& fake() { return machine_->fake(); }
  Pool& pool() { return *pool_; }
  store::HostStore& store() { return *store_; }
  const std::shared_ptr<store::HostStore>& store_ptr() const { return store_; }
  std::int64_t ranges() const { return geometry_.num_ranges(); }
  std::int64_t logical_bytes() const { return ranges() * geometry_.block_bytes; }
  std::int32_t length(std::int32_t slot) const { return lengths_[slot]; }

  void Restart() {
    Pool::Generation generation;
    EXPECT_OK(pool_->NewGeneration(&generation));
    handle_[1] = generation.generation;
    epoch_ = generation.epoch;
    lengths_ = generation.lengths;
  }
  void Edit(DeviceOp op, const SlotEdit& edit) {
    EXPECT_OK(cuda::EditSlots(Cache(op), handle_, {&edit, 1, nullptr, 0}, &epoch_, lengths_.data(), nullptr, nullptr));
  }
  // Appends stamped tokens in every layer, advances and commits. If tokens are refused, the pool has a fault.
  void Write(std::int32_t slot, std::int32_t count, float stamp, bool commit = true) {
    const std::int32_t offsets[] = {0, count};
    const auto width = static_cast<std::size_t>(geometry_.head_dim);
    std::vector<float> rows(static_cast<std::size_t>(count) * width);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      rows[i] = stamp + static_cast<float>(lengths_[slot]) + static_cast<float>(i) / 4096;
    }
    cuda::BatchOperands batch = {&slot, offsets, 1, count};
    std::vector<char> scratch(cuda::CheckedBytes(1, 0) + 256);
    void* const checked = scratch.data() + (256 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 256);
    for (std::int32_t layer = 0; layer < kLayers; ++layer) {
      const cuda::AppendOperands append = {&layer,      rows.data(), rows.data(),
                                           DType::kF32, 1,           static_cast<std::int32_t>(width)};
      EXPECT_OK(cuda::AppendKV(Cache(DeviceOp::kAppendKV), batch, append, &epoch_, checked, nullptr));
    }
    batch.num_tokens = -1;
    EXPECT_OK(cuda::Advance(Cache(DeviceOp::kAdvance), batch, &epoch_, lengths_.data(), nullptr));
    if (!commit) return;
    EXPECT_OK(pool_->Commit(slot, std::vector<std::int32_t>(count, 7)));
  }
  std::int32_t Begin(std::int32_t tokens, float stamp) {
    const Claim claim = pool_->Acquire({tokens});
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    Edit(DeviceOp::kAcquire, {static_cast<std::int32_t>(SlotOpcode::kOccupy), claim.slots[0], 0});
    Write(claim.slots[0], tokens, stamp);
    return claim.slots[0];
  }
  std::int32_t Fork(std::int32_t donor) {
    const Claim claim = pool_->Fork("fork", {{donor, 32}}, {});
    EXPECT_OK(claim.status);
    Edit(DeviceOp::kFork, {static_cast<std::int32_t>(SlotOpcode::kFork), claim.slots[0],
                           static_cast<std::int32_t>(claim.tokens[0]), donor});
    return claim.slots[0];
  }
  SwapPtr StartOut(std::int32_t slot) {
    SwapPtr swap;
    EXPECT_OK(pool_->SwapOut(slot, store_, &swap));
    return swap;
  }
  void Vacate(std::int32_t slot) {
    Edit(DeviceOp::kSwapOut, {static_cast<std::int32_t>(SlotOpcode::kVacate), slot, 0});
  }
  SwapPtr Out(std::int32_t slot) {
    SwapPtr swap = StartOut(slot);
    Vacate(slot);
    return swap;
  }
  SwapPtr OutToStore(std::int32_t slot) {
    SwapPtr swap = Out(slot);
    EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kStored; })) << store_->Numbers().last_error;
    return swap;
  }
  void RunIn(const Claim& claim) {
    Edit(DeviceOp::kSwapIn, {static_cast<std::int32_t>(SlotOpcode::kSwapIn), claim.slots[0],
                             static_cast<std::int32_t>(claim.tokens[0]), static_cast<std::int32_t>(claim.shared[0])});
  }
  std::int32_t In(const SwapPtr& swap) {
    EXPECT_OK(pool_->Prefetch(swap).status);
    EXPECT_TRUE(swap->Wait(20));
    const Claim claim = pool_->SwapIn(swap);
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    RunIn(claim);
    return claim.slots[0];
  }
  // Returns every byte of the first tokens of a slot, as kernels find them.
  std::vector<char> Bytes(std::int32_t slot, std::int64_t tokens) {
    const KVView view = pool_->View();
    const std::size_t row = static_cast<std::size_t>(geometry_.head_dim) * sizeof(float);
    std::vector<char> bytes;
    for (std::int64_t token = 0; token < tokens; ++token) {
      for (std::int64_t layer = 0; layer < kLayers; ++layer) {
        for (int kv = 0; kv < 2; ++kv) {
          const char* const at = view.At(slot, token, layer, kv, 0);
          bytes.insert(bytes.end(), at, at + row);
        }
      }
    }
    return bytes;
  }
  // Returns whether nothing of a swapped sequence is left anywhere.
  bool NothingLeft() {
    const PoolNumbers n = pool_->Numbers();
    return n.sequences_swapped == 0 && n.blocks_swapped == 0 && store_->Numbers().used_bytes == 0 && Adds();
  }
  bool Adds() {
    const PoolNumbers n = pool_->Numbers();
    return pool_->Audit().ok() &&
           n.blocks_total == n.blocks_mapped + n.blocks_parked + n.blocks_draining + n.blocks_free;
  }

 private:
  cuda::CacheOperands Cache(DeviceOp op) {
    cuda::CacheOperands cache;
    cache.op = op;
    cache.pools = machine_->device()->table();
    cache.handle = handle_;
    cache.epoch = &epoch_;
    cache.lengths = lengths_.data();
    cache.spec = geometry_.spec();
    return cache;
  }

  const Geometry geometry_;
  const std::shared_ptr<Machine> machine_;
  std::shared_ptr<Pool> pool_;
  std::shared_ptr<store::HostStore> store_;
  std::int32_t handle_[2] = {0, 0};
  std::uint32_t epoch_ = 0;
  std::vector<std::int32_t> lengths_;
};

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_DEVICE_SWAPPING_UTIL_H_
