#include "python/fake_devices_binding.h"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "base/device_table.h"
#include "device/device_state.h"
#include "device/fault.h"
#include "python/host_backends.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {
namespace {

// Indexed by ordinal; each device is opened by its first pool.
struct FakeDevices {
  std::mutex mutex;
  std::map<int, std::shared_ptr<DeviceState>> open;
};

FakeDevices& TheDevices() {
  static auto* const devices = new FakeDevices;
  return *devices;
}

Status OpenFakeDevice(int ordinal, std::shared_ptr<DeviceState>* out) {
  FakeDriver* fake = nullptr;
  KVPAGE_RETURN_IF_ERROR(GetFakeDriver(&fake));
  FakeDevices& devices = TheDevices();
  const std::lock_guard<std::mutex> lock(devices.mutex);
  std::shared_ptr<DeviceState>& device = devices.open[ordinal];
  if (device == nullptr) KVPAGE_RETURN_IF_ERROR(DeviceState::Make(fake->driver(), ordinal, &device));
  *out = device;
  return {};
}

// A pool's entry in its device's table, looked up as kernels do.
DevicePool& Find(int ordinal, std::int32_t id) {
  FakeDevices& devices = TheDevices();
  const std::lock_guard<std::mutex> lock(devices.mutex);
  const auto device = devices.open.find(ordinal);
  for (std::int32_t i = 0; device != devices.open.end() && device->second != nullptr && i < kMaxDevicePools; ++i) {
    DevicePool& entry = device->second->table()[i];
    if (entry.id == id) return entry;
  }
  throw std::invalid_argument("fake devices: there is no pool " + std::to_string(id) + " on device " +
                              std::to_string(ordinal));
}

// Simulates a program that leaves `tokens` tokens in a slot, written in every layer; -1: a program that releases it.
void Play(int ordinal, std::int32_t id, std::int32_t slot, std::int32_t tokens) {
  DevicePool& pool = Find(ordinal, id);
  DeviceSlot& row = pool.slots[slot];
  const std::int64_t layers = pool.spec[0];
  std::int32_t* const written = pool.written + slot * layers;
  const std::int32_t before = *std::min_element(written, written + layers);
  ++pool.epoch;
  if (tokens < 0 || row.released != 0) row.since = pool.epoch;
  row.length = std::max(tokens, 0);
  row.released = tokens < 0 ? 1 : 0;
  std::fill_n(written, layers, row.length);
  if (tokens < 0) __atomic_store_n(&pool.vacated[slot], static_cast<std::uint32_t>(before + 1), __ATOMIC_RELEASE);
}

// Simulates a program that is rejected because it needs `tokens` tokens in a slot.
void Refuse(int ordinal, std::int32_t id, std::int32_t slot, std::int32_t tokens) {
  DevicePool& pool = Find(ordinal, id);
  if (pool.faulted != 0) return;
  pool.faulted = 1;
  Fault fault;
  fault.op = static_cast<std::int32_t>(DeviceOp::kAppendKV);
  fault.kind = static_cast<std::int32_t>(FaultKind::kUnmapped);
  fault.slot = slot;
  fault.wanted = tokens;
  fault.have = pool.slots[slot].room;
  *pool.fault = fault;
  __atomic_store_n(&pool.fault->set, 1u, __ATOMIC_RELEASE);
}

// (room, length, released) of each slot.
std::vector<std::tuple<std::int32_t, std::int32_t, bool>> Rows(int ordinal, std::int32_t id) {
  const DevicePool& pool = Find(ordinal, id);
  std::vector<std::tuple<std::int32_t, std::int32_t, bool>> rows;
  for (std::int64_t slot = 0; slot < pool.spec[3]; ++slot) {
    rows.emplace_back(pool.slots[slot].room, pool.slots[slot].length, pool.slots[slot].released != 0);
  }
  return rows;
}

struct FakeDevicesHandle {};

}  // namespace

void BindFakeDevices(nb::module_& m) {
  nb::class_<FakeDevicesHandle>(m, "FakeDevices")
      .def(
          "play",
          [](FakeDevicesHandle&, int device, std::int32_t pool, std::int32_t slot, std::int32_t tokens) {
            Play(device, pool, slot, tokens);
          },
          "device"_a, "pool"_a, "slot"_a, "tokens"_a)
      .def(
          "refuse",
          [](FakeDevicesHandle&, int device, std::int32_t pool, std::int32_t slot, std::int32_t tokens) {
            Refuse(device, pool, slot, tokens);
          },
          "device"_a, "pool"_a, "slot"_a, "tokens"_a)
      .def(
          "rows", [](FakeDevicesHandle&, int device, std::int32_t pool) { return Rows(device, pool); }, "device"_a,
          "pool"_a)
      .def("close", [](FakeDevicesHandle&) {
        FakeDevices& devices = TheDevices();
        const std::lock_guard<std::mutex> lock(devices.mutex);
        devices.open.clear();
      });
  m.attr("fake_devices") = FakeDevicesHandle{};
  RegisterDeviceBackend("fake_cuda", &OpenFakeDevice);
}

}  // namespace kvpage
