// Helpers for tests of pools on a device: the fake driver, pools with a mirror on it, and programs that run on its
// streams and read the table in its memory, as kernels do.
#ifndef KVPAGE_TESTS_DEVICE_UTIL_H_
#define KVPAGE_TESTS_DEVICE_UTIL_H_

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cache/pool.h"
#include "cache/registry.h"
#include "device/device_mirror.h"
#include "device/device_state.h"
#include "testing/fake_driver.h"
#include "tests/expect_ok.h"
#include "tests/host_verbs.h"
#include "vmm/cuda_vmm.h"

namespace kvpage::testing {

constexpr int kSlots = 4;
constexpr int kLayers = 2;

// Blocks of one page and 16 tokens.
inline Geometry DeviceGeometry() {
  Geometry geometry;
  if (!Geometry::Make({kLayers, 1, 16, kSlots, 128, 0, 0, 16}, 4096, &geometry).ok()) std::abort();
  return geometry;
}

inline bool Mentions(const Status& status, const std::string& text) {
  return status.message().find(text) != std::string::npos;
}

// A machine with fake devices. At its end nothing may be left in the driver, and no rule may have been broken.
class Machine {
 public:
  // `mapping_waits`: as in FakeDriver::Options.
  explicit Machine(int num_devices = 1, bool mapping_waits = false) {
    FakeDriver::Options options;
    options.mapping_waits = mapping_waits;
    options.devices = num_devices;
    options.granularity = 4096;
    if (!FakeDriver::Make(options, &fake_).ok()) std::abort();
    for (int i = 0; i < num_devices; ++i) {
      std::shared_ptr<DeviceState> device;
      EXPECT_OK(DeviceState::Make(fake_->driver(), i, &device));
      devices_.push_back(std::move(device));
      streams_.push_back(NewStream(i));
    }
  }
  ~Machine() {
    for (const auto& [device, stream] : owned_) {
      const ContextScope scope(*devices_[device]->context());
      static_cast<void>(fake_->driver().StreamDestroy(stream));
    }
    devices_.clear();
    const FakeDriver::State left = fake_->Report();
    EXPECT_TRUE(left.empty() || (rest_stays_ && left.violations == 0)) << left.ToString();
  }

  // Allows things to be left in the driver at the end.
  void LeaveTheRest() { rest_stays_ = true; }

  FakeDriver& fake() { return *fake_; }
  const std::shared_ptr<DeviceState>& device(int i = 0) { return devices_[i]; }
  // The stream that XLA runs programs on.
  cu::Stream stream(int i = 0) { return streams_[i]; }
  // May be called from any thread.
  cu::Stream NewStream(int i = 0) {
    const ContextScope scope(*devices_[i]->context());
    cu::Stream stream = nullptr;
    if (fake_->driver().StreamCreate(&stream, cu::kStreamNonBlocking) != cu::Result::kSuccess) std::abort();
    const std::lock_guard<std::mutex> lock(owned_mutex_);
    owned_.emplace_back(i, stream);
    return stream;
  }

  // Like OpenPool, but with a given id. On failure, returns a status and leaves null.
  Status Open(std::int32_t id, std::int64_t blocks, std::shared_ptr<Pool>* out, int device = 0,
              PoolOptions options = {}) {
    return Open(id, DeviceGeometry(), blocks, out, device, options);
  }
  Status Open(std::int32_t id, const Geometry& geometry, std::int64_t blocks, std::shared_ptr<Pool>* out,
              int device = 0, PoolOptions options = {}) {
    std::unique_ptr<CudaVmm> vmm;
    KVPAGE_RETURN_IF_ERROR(
        CudaVmm::Make(devices_[device]->context(), geometry.virtual_bytes(), geometry.block_bytes, &vmm));
    std::unique_ptr<DeviceMirror> mirror;
    KVPAGE_RETURN_IF_ERROR(DeviceMirror::Make(devices_[device], geometry, vmm->base(), options, &mirror));
    std::shared_ptr<Pool> pool;
    KVPAGE_RETURN_IF_ERROR(Pool::Make(geometry, blocks * geometry.block_bytes, options, std::move(vmm), nullptr, &pool,
                                      std::move(mirror)));
    pool->set_id(id);
    KVPAGE_RETURN_IF_ERROR(pool->OpenMirror());
    *out = std::move(pool);
    return {};
  }
  std::shared_ptr<Pool> MakePool(std::int32_t id, std::int64_t blocks, int device = 0, PoolOptions options = {}) {
    std::shared_ptr<Pool> pool;
    EXPECT_OK(Open(id, blocks, &pool, device, options));
    return pool;
  }

  // Returns a pool's entry in the table as kernels find it, or null if there is none.
  DevicePool* Find(std::int32_t id, int device = 0) { return Find(devices_[device]->table(), id); }
  static DevicePool* Find(DevicePool* table, std::int32_t id) {
    for (std::int32_t i = 0; i < kMaxDevicePools; ++i) {
      DevicePool& entry = table[(id % kMaxDevicePools + i) % kMaxDevicePools];
      if (entry.id == id) return &entry;
      if (entry.id == kEmptyEntry) return nullptr;
    }
    return nullptr;
  }

 private:
  std::unique_ptr<FakeDriver> fake_;
  std::vector<std::shared_ptr<DeviceState>> devices_;
  std::vector<cu::Stream> streams_;
  bool rest_stays_ = false;
  std::mutex owned_mutex_;
  std::vector<std::pair<int, cu::Stream>> owned_;  // with their devices
};

// Programs on one stream with one cache value. As on a device, each op is two work items in stream order: the check,
// which counts the op in, and the rest, which counts it out.
class DeviceProgram {
 public:
  DeviceProgram(Machine* machine, std::int32_t id, int device = 0)
      : machine_(machine), device_(device), stream_(machine->stream(device)), state_(std::make_shared<State>()) {
    state_->table = machine->device(device)->table();
    state_->id = id;
  }

  void Restart(Pool* pool) {
    Pool::Generation generation;
    EXPECT_OK(pool->NewGeneration(&generation));
    Use(generation);
  }
  void Use(const Pool::Generation& generation) {
    state_->generation = generation.generation;
    state_->epoch = generation.epoch;
    state_->lengths = generation.lengths;
  }
  void set_stream(cu::Stream stream) { stream_ = stream; }
  // Holds the next op that passes its check until ReleaseStream(stream). The op must run on this stream.
  void HoldAfterCheck(cu::Stream stream) {
    state_->hold = [fake = &machine_->fake(), stream] { fake->HoldStream(stream); };
  }
  std::int32_t length(std::int32_t slot) const { return state_->lengths[slot]; }
  std::uint32_t epoch() const { return state_->epoch; }
  // Number of ops that passed their check.
  int launches() const { return state_->launches; }

  void Acquire(std::int32_t slot) {
    Launch(DeviceOp::kAcquire, slot, [slot](State* state, DevicePool* pool) {
      Empty(pool, slot);
      pool->slots[slot].released = 0;
      state->lengths[slot] = 0;
    });
  }
  void Release(std::int32_t slot) {
    Launch(DeviceOp::kRelease, slot, [slot](State* state, DevicePool* pool) {
      const std::int32_t* const layers = pool->written + slot * kLayers;
      const auto written = static_cast<std::uint32_t>(*std::min_element(layers, layers + kLayers));
      Empty(pool, slot);
      pool->slots[slot].released = 1;
      state->lengths[slot] = -1;
      __atomic_store_n(const_cast<std::uint32_t*>(&pool->vacated[slot]), written + 1, __ATOMIC_RELEASE);
    });
  }
  // Appends in every layer and advances.
  void Write(std::int32_t slot, std::int32_t count, bool advance = true) {
    Launch(
        DeviceOp::kAppendKV, slot,
        [slot, count, advance](State* state, DevicePool* pool) {
          const std::int32_t end = state->lengths[slot] + count;
          for (int layer = 0; layer < kLayers; ++layer) {
            for (std::int32_t token = state->lengths[slot]; token < end; ++token) {
              *reinterpret_cast<float*>(pool->view.At(slot, token, layer, 0, 0)) = static_cast<float>(token);
            }
            pool->written[slot * kLayers + layer] = end;
          }
          if (advance) state->lengths[slot] = pool->slots[slot].length = end;
        },
        count);
  }

 private:
  struct State {
    DevicePool* table = nullptr;
    std::int32_t id = 0, generation = 0;
    std::uint32_t epoch = 0;
    std::vector<std::int32_t> lengths;
    int launches = 0;
    std::function<void()> hold;
  };
  using Body = std::function<void(State*, DevicePool*)>;

  static void Empty(DevicePool* pool, std::int32_t slot) {
    pool->slots[slot].since = pool->epoch;
    pool->slots[slot].length = 0;
    for (int layer = 0; layer < kLayers; ++layer) pool->written[slot * kLayers + layer] = 0;
  }
  static void Record(DevicePool* entry, const Fault& fault) {
    if (__atomic_exchange_n(&entry->faulted, 1u, __ATOMIC_ACQ_REL) != 0) return;
    *entry->fault = fault;
    __atomic_store_n(&entry->fault->set, 1u, __ATOMIC_RELEASE);
  }
  // Runs the check; returns null if the op is refused.
  static DevicePool* Enter(State* state, DeviceOp op, std::int32_t slot, std::int32_t tokens) {
    DevicePool* pool = Machine::Find(state->table, state->id);
    if (pool != nullptr) __atomic_add_fetch(&pool->readers, 1, __ATOMIC_SEQ_CST);
    if (Check(state, pool, op, slot, tokens)) return pool;
    if (pool != nullptr) Leave(pool);
    return nullptr;
  }
  static void Leave(DevicePool* pool) { __atomic_sub_fetch(&pool->readers, 1, __ATOMIC_SEQ_CST); }
  // Reads a word that the host's copies may be writing, as a kernel does.
  template <class T>
  static T Load(const T& word) {
    return __atomic_load_n(&word, __ATOMIC_SEQ_CST);
  }
  static bool Check(State* state, DevicePool* pool, DeviceOp op, std::int32_t slot, std::int32_t tokens) {
    Fault fault;
    fault.op = static_cast<std::int32_t>(op);
    fault.slot = slot;
    const auto fail = [&](DevicePool* entry, FaultKind kind, std::int64_t wanted, std::int64_t have) {
      fault.kind = static_cast<std::int32_t>(kind);
      fault.wanted = wanted;
      fault.have = have;
      Record(entry, fault);
      return false;
    };
    if (pool == nullptr) return fail(&state->table[kMaxDevicePools], FaultKind::kNoPool, 0, state->id);
    if (Load(pool->open) == 0) return fail(pool, FaultKind::kClosed, 0, 0);
    const std::int32_t generation = Load(pool->generation);
    if (generation != state->generation) {
      return fail(pool, FaultKind::kGeneration, state->generation, generation);
    }
    if (pool->epoch != state->epoch) return fail(pool, FaultKind::kEpoch, state->epoch, pool->epoch);
    if (op == DeviceOp::kAcquire ? state->lengths[slot] >= 0 : state->lengths[slot] < 0) {
      return fail(pool, op == DeviceOp::kAcquire ? FaultKind::kSlotTaken : FaultKind::kSlotFree, 0, 0);
    }
    const std::int64_t end = state->lengths[slot] + tokens, room = Load(pool->slots[slot].room);
    if (tokens > 0 && end > room) return fail(pool, FaultKind::kUnmapped, end, room);
    state->epoch = ++pool->epoch;
    ++state->launches;
    return true;
  }
  void Launch(DeviceOp op, std::int32_t slot, Body body, std::int32_t tokens = 0) {
    const DeviceState::Queueing queueing(machine_->device(device_).get(), stream_);
    EXPECT_OK(queueing.status());
    const auto pool = std::make_shared<DevicePool*>(nullptr);
    machine_->fake().Enqueue(stream_, [state = state_, pool, op, slot, tokens] {
      *pool = Enter(state.get(), op, slot, tokens);
      if (*pool != nullptr && state->hold != nullptr) std::exchange(state->hold, nullptr)();
    });
    machine_->fake().Enqueue(stream_, [state = state_, pool, body = std::move(body)] {
      if (*pool == nullptr) return;
      body(state.get(), *pool);
      Leave(*pool);
    });
  }

  Machine* const machine_;
  const int device_;
  cu::Stream stream_;
  const std::shared_ptr<State> state_;
};

// The host and device sides of an acquire and a release.
inline std::int32_t Acquire(Pool* pool, DeviceProgram* program, std::int64_t tokens) {
  const Claim claim = pool->Acquire({tokens});
  EXPECT_OK(claim.status);
  if (!claim.status.ok()) return -1;
  program->Acquire(claim.slots[0]);
  return claim.slots[0];
}
inline void Release(Pool* pool, DeviceProgram* program, std::int32_t slot) {
  EXPECT_OK(StartRelease(*pool, {slot}));
  program->Release(slot);
}

inline void Pause() { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }

// Waits until another thread has written `wanted` to a word of device memory; false after ten seconds.
inline bool Becomes(const std::int32_t& word, std::int32_t wanted) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (__atomic_load_n(&word, __ATOMIC_SEQ_CST) != wanted) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_DEVICE_UTIL_H_
