#include "python/testing_binding.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "python/fake_devices_binding.h"
#include "python/host_backends.h"
#include "testing/fake_driver.h"
#include "vmm/cuda_context.h"
#include "vmm/cuda_vmm.h"
#include "vmm/limits.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {
namespace {

constexpr int kDevices = 8;

// The process-wide fake driver: created on first use and never destroyed, because pools may be destroyed later than
// statics.
struct Fake {
  std::mutex mutex;
  std::unique_ptr<FakeDriver> driver;
};

Fake& TheFake() {
  static Fake* const fake = new Fake;
  return *fake;
}

Status Configure(std::int64_t granularity, std::int64_t memory_bytes) {
  Fake& fake = TheFake();
  const std::lock_guard<std::mutex> lock(fake.mutex);
  if (fake.driver != nullptr && fake.driver->Report().contexts > 0) {
    return FailedPrecondition("fake driver: a pool uses it (" + fake.driver->Report().ToString() + "): close it first");
  }
  fake.driver.reset();
  FakeDriver::Options options;
  options.devices = kDevices;
  options.granularity = granularity;
  options.device_bytes = memory_bytes;
  return FakeDriver::Make(options, &fake.driver);
}

}  // namespace

Status GetFakeDriver(FakeDriver** out) {
  Fake& fake = TheFake();
  {
    const std::lock_guard<std::mutex> lock(fake.mutex);
    *out = fake.driver.get();
  }
  if (*out != nullptr) return {};
  // By default it maps pages, like the CPU, and has as much memory as the machine.
  const std::int64_t limit = MemoryLimitBytes();
  KVPAGE_RETURN_IF_ERROR(Configure(PageBytes(), limit > 0 ? limit : std::int64_t{1} << 40));
  return GetFakeDriver(out);
}

namespace {

FakeDriver& UseFake() {
  FakeDriver* fake = nullptr;
  if (const Status status = GetFakeDriver(&fake); !status.ok()) throw std::runtime_error(status.message());
  return *fake;
}

cu::Call FindCall(const std::string& symbol) {
  for (int i = 0; i < static_cast<int>(cu::Call::kCount); ++i) {
    if (symbol == cu::Symbol(static_cast<cu::Call>(i))) return static_cast<cu::Call>(i);
  }
  throw std::invalid_argument("fake driver: no function is called '" + symbol + "'");
}

// Represents the process-wide fake driver.
struct FakeHandle {};

Status MakeFakeVmm(int device, std::int64_t virtual_bytes, std::int64_t block_bytes, std::unique_ptr<Vmm>* out) {
  FakeDriver* fake = nullptr;
  KVPAGE_RETURN_IF_ERROR(GetFakeDriver(&fake));
  std::shared_ptr<CudaContext> context;
  KVPAGE_RETURN_IF_ERROR(CudaContext::Make(fake->driver(), device % kDevices, &context));
  std::unique_ptr<CudaVmm> vmm;
  KVPAGE_RETURN_IF_ERROR(CudaVmm::Make(std::move(context), virtual_bytes, block_bytes, &vmm));
  *out = std::move(vmm);
  return {};
}

}  // namespace

void BindTesting(nb::module_& m) {
  nb::class_<FakeHandle>(m, "FakeDriver")
      .def(
          "configure",
          [](FakeHandle&, std::int64_t granularity, std::int64_t memory_bytes) {
            if (const Status status = Configure(granularity, memory_bytes); !status.ok()) {
              throw std::runtime_error(status.message());
            }
          },
          "granularity"_a, "memory_bytes"_a)
      .def(
          "fail",
          [](FakeHandle&, const std::string& function, std::int64_t at, int code, std::int64_t times) {
            UseFake().FailAt(FindCall(function), at, static_cast<cu::Result>(code), times);
          },
          "function"_a, "at"_a, "code"_a, "times"_a = 1)
      .def(
          "fail_any", [](FakeHandle&, std::int64_t at, int code) { UseFake().FailAtAny(at, cu::Result{code}); }, "at"_a,
          "code"_a)
      .def("free_bytes",
           [](FakeHandle&) {
             std::shared_ptr<CudaContext> context;
             std::int64_t bytes = 0;
             Status status = CudaContext::Make(UseFake().driver(), 0, &context);
             if (status.ok()) status = FreeDeviceBytes(*context, &bytes);
             if (!status.ok()) throw std::runtime_error(status.message());
             return bytes;
           })
      .def("clear_faults", [](FakeHandle&) { UseFake().ClearFaults(); })
      .def_prop_ro("faults", [](FakeHandle&) { return UseFake().faults(); })
      .def("calls",
           [](FakeHandle&) {
             std::map<std::string, std::int64_t> calls;
             for (int i = 0; i < static_cast<int>(cu::Call::kCount); ++i) {
               const auto call = static_cast<cu::Call>(i);
               if (const std::int64_t count = UseFake().calls(call); count > 0) calls[cu::Symbol(call)] = count;
             }
             return calls;
           })
      .def("report", [](FakeHandle&) {
        const FakeDriver::State state = UseFake().Report();
        const std::map<std::string, std::int64_t> counts = {{"reservations", state.reservations},
                                                            {"handles", state.handles},
                                                            {"imported", state.imported},
                                                            {"mappings", state.mappings},
                                                            {"allocations", state.allocations},
                                                            {"host_allocations", state.host_allocations},
                                                            {"streams", state.streams},
                                                            {"events", state.events},
                                                            {"contexts", state.contexts},
                                                            {"pushed", state.pushed},
                                                            {"queued", state.queued},
                                                            {"used_bytes", state.used_bytes},
                                                            {"released_while_mapped", state.released_while_mapped},
                                                            {"violations", state.violations}};
        return std::make_pair(counts, state.first_violation);
      });
  m.attr("fake_driver") = FakeHandle{};
  RegisterHostBackend("fake", &MakeFakeVmm);
  BindFakeDevices(m);
}

}  // namespace kvpage
