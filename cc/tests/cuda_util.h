// Helpers for tests of CUDA kernels: the device's table of pools as a host would set it up, in memory whose bounds
// AddressSanitizer checks.
#ifndef KVPAGE_TESTS_CUDA_UTIL_H_
#define KVPAGE_TESTS_CUDA_UTIL_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "base/device_table.h"
#include "cache/geometry.h"
#include "kernels/cuda/kernels.h"
#include "testing/cuda_emulation/emulator.h"

namespace kvpage::testing {

// Allocates exactly as many elements as requested, separately.
template <class T>
std::unique_ptr<T[]> Exactly(std::size_t count, const T* from = nullptr) {
  std::unique_ptr<T[]> copy(new T[count]());
  if (from != nullptr && count > 0) std::memcpy(copy.get(), from, count * sizeof(T));
  return copy;
}
template <class T>
std::unique_ptr<T[]> Exactly(const std::vector<T>& from) {
  return Exactly(from.size(), from.data());
}
inline std::unique_ptr<std::int32_t[]> Ints(std::initializer_list<std::int32_t> from) {
  return Exactly(from.size(), from.begin());
}

// A pool's entry and the memory it points to.
class PoolRows {
 public:
  PoolRows(const SpecInts& spec, const KVView& view, std::int32_t id, DevicePool* entry) : entry_(entry), spec_(spec) {
    const auto slots = static_cast<std::size_t>(spec[3]);
    slots_ = Exactly<DeviceSlot>(slots);
    written_ = Exactly<std::int32_t>(slots * static_cast<std::size_t>(spec[0]));
    marks_ = Exactly<std::uint32_t>(slots);
    vacated_ = Exactly<std::uint32_t>(slots);
    fault_ = Exactly<Fault>(1);
    *entry = DevicePool();
    entry->id = id;
    entry->open = 1;
    for (int i = 0; i < 8; ++i) entry->spec[i] = spec[i];
    entry->view = view;
    entry->slots = slots_.get();
    entry->written = written_.get();
    entry->marks = marks_.get();
    entry->fault = fault_.get();
    entry->vacated = vacated_.get();
  }

  DevicePool& entry() { return *entry_; }
  DeviceSlot& slot(std::int64_t slot) { return slots_[slot]; }
  std::int32_t& written(std::int64_t slot, std::int64_t layer) { return written_[slot * spec_[0] + layer]; }
  std::uint32_t& vacated(std::int64_t slot) { return vacated_[slot]; }

  // Takes the first fault since the last call, as the host does.
  Fault TakeFault() { return Take(entry_, fault_.get()); }
  static Fault Take(DevicePool* entry, Fault* fault) {
    const Fault taken = *fault;
    *fault = Fault();
    entry->faulted = 0;
    return taken;
  }

  // Returns everything that an op may change.
  std::vector<char> State() const {
    const auto slots = static_cast<std::size_t>(spec_[3]);
    std::vector<char> state(sizeof(std::uint32_t));
    std::memcpy(state.data(), &entry_->epoch, sizeof(std::uint32_t));
    const auto append = [&](const void* p, std::size_t bytes) {
      state.insert(state.end(), static_cast<const char*>(p), static_cast<const char*>(p) + bytes);
    };
    append(slots_.get(), slots * sizeof(DeviceSlot));
    append(written_.get(), slots * static_cast<std::size_t>(spec_[0]) * sizeof(std::int32_t));
    append(vacated_.get(), slots * sizeof(std::uint32_t));
    return state;
  }

 private:
  DevicePool* const entry_;
  const SpecInts spec_;
  std::unique_ptr<DeviceSlot[]> slots_;
  std::unique_ptr<std::int32_t[]> written_;
  std::unique_ptr<std::uint32_t[]> marks_, vacated_;
  std::unique_ptr<Fault[]> fault_;
};

struct DeviceTable {
  std::unique_ptr<DevicePool[]> entries = Exactly<DevicePool>(kDeviceTableEntries);
  std::unique_ptr<Fault[]> no_pool = Exactly<Fault>(1);  // faults of programs whose pool is not in the table

  DeviceTable() { entries[kMaxDevicePools].fault = no_pool.get(); }
  ~DeviceTable() {
    for (std::int32_t i = 0; i < kDeviceTableEntries; ++i) EXPECT_EQ(entries[i].readers, 0u) << "entry " << i;
  }
  PoolRows Add(const SpecInts& spec, const KVView& view, std::int32_t id) {
    return PoolRows(spec, view, id, &entries[id % kMaxDevicePools]);
  }
};

// A cache value as operands of a program.
struct CacheBuffers {
  std::unique_ptr<std::int32_t[]> handle = Exactly<std::int32_t>(2);
  std::unique_ptr<std::uint32_t[]> epoch = Exactly<std::uint32_t>(1);
  std::unique_ptr<std::int32_t[]> lengths;

  CacheBuffers(std::int32_t id, std::int32_t generation, std::uint32_t at, const std::vector<std::int32_t>& of)
      : lengths(Exactly(of)) {
    handle[0] = id;
    handle[1] = generation;
    epoch[0] = at;
  }
  cuda::CacheOperands Operands(DeviceOp op, DeviceTable& table, const SpecInts& spec) const {
    return {op, table.entries.get(), handle.get(), epoch.get(), lengths.get(), spec};
  }
};

// Scratch memory for the check of a batch, in a pool with `max_slots` slots.
inline std::unique_ptr<char[]> Scratch(std::int64_t num_sequences, std::int64_t max_slots) {
  return Exactly<char>(cuda::CheckedBytes(num_sequences, max_slots));
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_CUDA_UTIL_H_
