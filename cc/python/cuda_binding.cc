#include "python/cuda_binding.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/scratch.h"
#include "python/errors.h"
#include "python/gil.h"
#include "vmm/cuda_context.h"
#include "vmm/driver.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {
namespace {

struct DeviceReport {
  int ordinal = 0;
  DeviceDescription description;
  std::string problem;
};

struct DriverReport {
  int version = 0;
  std::string problem;
  std::vector<DeviceReport> devices;
};

DriverReport Report() {
  DriverReport report;
  const Driver* driver = nullptr;
  int count = 0;
  Status status = Driver::Open(&driver);
  if (status.ok()) static_cast<void>(driver->DriverGetVersion(&report.version));
  if (status.ok()) status = CountDevices(*driver, &count);
  report.problem = status.message();
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    DeviceReport device;
    device.ordinal = ordinal;
    device.problem = DescribeDevice(*driver, ordinal, &device.description).message();
    report.devices.push_back(std::move(device));
  }
  return report;
}

std::int64_t FreeBytes(int ordinal) {
  const Driver* driver = nullptr;
  Raise(Driver::Open(&driver));
  std::shared_ptr<CudaContext> context;
  Raise(CudaContext::Make(*driver, ordinal, &context));
  std::int64_t bytes = 0;
  Raise(FreeDeviceBytes(*context, &bytes));
  return bytes;
}

std::size_t AttentionScratchBytes(std::int32_t q_dtype, std::int32_t kv_dtype, std::int32_t num_q_heads,
                                  std::int32_t num_kv_heads, std::int32_t head_dim, std::int64_t max_context,
                                  std::int64_t num_sequences, std::int64_t num_tokens, std::int64_t max_slots,
                                  bool exact_weights) {
  cuda::AttentionOperands attention;
  attention.q_dtype = static_cast<DType>(q_dtype);
  attention.kv_dtype = static_cast<DType>(kv_dtype);
  attention.num_q_heads = num_q_heads;
  attention.num_kv_heads = num_kv_heads;
  attention.head_dim = head_dim;
  attention.max_context = max_context;
  attention.max_slots = max_slots;
  attention.options.exact_weights = exact_weights;
  return cuda::AttentionBytes(attention, num_sequences, num_tokens);
}

}  // namespace

void BindCuda(nb::module_& m) {
  nb::class_<DeviceReport>(m, "CudaDevice")
      .def_ro("ordinal", &DeviceReport::ordinal)
      .def_prop_ro("name", [](const DeviceReport& d) { return d.description.name; })
      .def_prop_ro("compute_capability",
                   [](const DeviceReport& d) { return std::make_pair(d.description.major, d.description.minor); })
      .def_prop_ro("multiprocessors", [](const DeviceReport& d) { return d.description.multiprocessors; })
      .def_prop_ro("total_bytes", [](const DeviceReport& d) { return d.description.total_bytes; })
      .def_prop_ro("virtual_memory", [](const DeviceReport& d) { return d.description.virtual_memory; })
      .def_prop_ro("shareable", [](const DeviceReport& d) { return d.description.posix_handles; })
      .def_prop_ro("granularity", [](const DeviceReport& d) { return d.description.granularity; })
      .def_ro("problem", &DeviceReport::problem);
  nb::class_<DriverReport>(m, "CudaReport")
      .def_ro("driver_version", &DriverReport::version)
      .def_ro("problem", &DriverReport::problem)
      .def_ro("devices", &DriverReport::devices);
  m.def("cuda_report", &Report, nb::call_guard<GilRelease>());
  m.def("free_device_bytes", &FreeBytes, "ordinal"_a, nb::call_guard<GilRelease>());
  // Used when lowering for CUDA: sizes of the device scratch that custom calls have as their last result.
  m.def("checked_scratch_bytes", &cuda::CheckedBytes, "num_sequences"_a, "max_slots"_a);
  m.def("attention_plan_bytes", &cuda::PlanBytes, "num_sequences"_a);
  m.def("attention_scratch_bytes", &AttentionScratchBytes, "q_dtype"_a, "kv_dtype"_a, "num_q_heads"_a, "num_kv_heads"_a,
        "head_dim"_a, "max_context"_a, "num_sequences"_a, "num_tokens"_a, "max_slots"_a, "exact_weights"_a = false);
}

}  // namespace kvpage
