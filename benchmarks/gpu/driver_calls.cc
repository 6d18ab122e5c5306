// Measures the driver's virtual memory calls at several block sizes and its copy bandwidth; prints one JSON object.
//
//   kvpage_driver_calls [--fake] [--device N] [--blocks N] [--rounds N] [--copy-mib N]
//
// --fake uses the fake driver, to check this program; its times are meaningless.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "testing/fake_driver.h"
#include "vmm/cuda_context.h"
#include "vmm/driver.h"

namespace kvpage {
namespace {

constexpr std::int64_t kMiB = std::int64_t{1} << 20;

struct Options {
  bool fake = false;
  int device = 0;
  std::int64_t blocks = 32;
  int rounds = 8;
  std::int64_t copy_mib = 1024;
};

// Samples by name, in the order in which names were first seen.
class Samples {
 public:
  void Add(const std::string& name, double microseconds) {
    if (samples_.find(name) == samples_.end()) order_.push_back(name);
    samples_[name].push_back(microseconds);
  }

  // "name": {"median": .., "low": .., "high": .., "count": ..}; low and high are quartiles.
  std::string ToJson() const {
    std::string text;
    for (const std::string& name : order_) {
      std::vector<double> sorted = samples_.at(name);
      std::sort(sorted.begin(), sorted.end());
      const auto at = [&](double share) { return sorted[static_cast<std::size_t>(share * (sorted.size() - 1))]; };
      char row[200];
      std::snprintf(row, sizeof(row), R"(%s"%s": {"median": %.3f, "low": %.3f, "high": %.3f, "count": %zu})",
                    text.empty() ? "" : ", ", name.c_str(), at(0.5), at(0.25), at(0.75), sorted.size());
      text += row;
    }
    return "{" + text + "}";
  }

 private:
  std::vector<std::string> order_;
  std::map<std::string, std::vector<double>> samples_;
};

class Clock {
 public:
  double Microseconds() const {
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// Times one call of the driver and keeps the time under `name`.
#define TIMED(samples, name, driver, call, ...)                         \
  do {                                                                  \
    const Clock clock;                                                  \
    const cu::Result result = (driver).call(__VA_ARGS__);               \
    const double microseconds = clock.Microseconds();                   \
    if (result != cu::Result::kSuccess) {                               \
      return (driver).Explain(result, cu::Call::k##call, "in a round"); \
    }                                                                   \
    (samples)->Add(name, microseconds);                                 \
  } while (false)

cu::AllocationProp Prop(const DeviceDescription& device, int ordinal) {
  cu::AllocationProp prop;
  prop.location.id = ordinal;
  if (device.posix_handles) prop.handle_type = cu::HandleType::kPosixFileDescriptor;
  return prop;
}

// The life cycle of `blocks` blocks. Access is granted block by block, as for a growing slot, and then, after the
// blocks were unmapped and mapped again, for all of them in one call, as at admission.
Status Round(const Driver& driver, const cu::AllocationProp& prop, int device, std::int64_t bytes, std::int64_t blocks,
             Samples* samples) {
  const std::size_t size = static_cast<std::size_t>(bytes);
  const std::size_t all = size * static_cast<std::size_t>(blocks);
  cu::AccessDesc access;
  access.location.id = device;
  cu::DevicePtr base = 0;
  TIMED(samples, "reserve", driver, MemAddressReserve, &base, all, size, 0, 0);
  std::vector<cu::MemHandle> handles(blocks);
  for (cu::MemHandle& handle : handles) TIMED(samples, "create", driver, MemCreate, &handle, size, &prop, 0);
  for (int pass = 0; pass < 2; ++pass) {
    for (std::int64_t i = 0; i < blocks; ++i) {
      const cu::DevicePtr place = base + size * static_cast<std::size_t>(i);
      TIMED(samples, "map", driver, MemMap, place, size, 0, handles[i], 0);
      if (pass == 0) TIMED(samples, "set_access", driver, MemSetAccess, place, size, &access, 1);
    }
    if (pass == 1) TIMED(samples, "set_access_of_all", driver, MemSetAccess, base, all, &access, 1);
    KVPAGE_CU(driver, MemsetD8Async, "of a round", base, 1, all, nullptr);
    KVPAGE_CU(driver, StreamSynchronize, "of a round", nullptr);
    for (std::int64_t i = 0; i < blocks; ++i) {
      TIMED(samples, "unmap", driver, MemUnmap, base + size * static_cast<std::size_t>(i), size);
    }
  }
  for (const cu::MemHandle handle : handles) TIMED(samples, "release", driver, MemRelease, handle);
  TIMED(samples, "free_address", driver, MemAddressFree, base, all);
  return {};
}

// Bytes read plus written a second, best and median of queues of copies.
Status CopyBandwidth(const Driver& driver, std::int64_t bytes, std::string* json) {
  const std::size_t size = static_cast<std::size_t>(bytes);
  cu::DevicePtr from = 0, to = 0;
  KVPAGE_CU(driver, MemAlloc, "of the copy's source", &from, size);
  KVPAGE_CU(driver, MemAlloc, "of the copy's target", &to, size);
  std::vector<char> noise(size / 16);
  std::uint32_t state = 1;
  for (char& byte : noise) byte = static_cast<char>((state = state * 1664525u + 1013904223u) >> 24);
  for (std::size_t at = 0; at + noise.size() <= size; at += noise.size()) {
    KVPAGE_CU(driver, MemcpyHtoDAsync, "of the copy's source", from + at, noise.data(), noise.size(), nullptr);
  }
  KVPAGE_CU(driver, StreamSynchronize, "of the copy", nullptr);
  constexpr int kSamples = 9, kCopies = 20;
  std::vector<double> speeds;
  for (int sample = 0; sample <= kSamples; ++sample) {
    const Clock clock;
    for (int i = 0; i < kCopies; ++i) KVPAGE_CU(driver, MemcpyDtoDAsync, "of the copy", to, from, size, nullptr);
    KVPAGE_CU(driver, StreamSynchronize, "of the copy", nullptr);
    if (sample > 0) speeds.push_back(2e-3 * static_cast<double>(bytes) * kCopies / clock.Microseconds());
  }
  std::sort(speeds.begin(), speeds.end());
  char text[100];
  std::snprintf(text, sizeof(text), R"({"gbps": %.1f, "gbps_best": %.1f, "bytes": %lld})", speeds[kSamples / 2],
                speeds.back(), static_cast<long long>(bytes));
  *json = text;
  KVPAGE_CU(driver, MemFree, "of the copy's source", from);
  KVPAGE_CU(driver, MemFree, "of the copy's target", to);
  return {};
}

Status Run(const Options& options) {
  std::unique_ptr<FakeDriver> fake;
  const Driver* driver = nullptr;
  if (options.fake) {
    FakeDriver::Options fake_options;
    fake_options.device_bytes = std::int64_t{8} << 30;
    KVPAGE_RETURN_IF_ERROR(FakeDriver::Make(fake_options, &fake));
    driver = &fake->driver();
  } else {
    KVPAGE_RETURN_IF_ERROR(Driver::Open(&driver));
  }
  DeviceDescription device;
  KVPAGE_RETURN_IF_ERROR(DescribeDevice(*driver, options.device, &device));
  std::shared_ptr<CudaContext> context;
  KVPAGE_RETURN_IF_ERROR(CudaContext::Make(*driver, options.device, &context));
  const ContextScope scope(*context);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  int version = 0;
  KVPAGE_CU(*driver, DriverGetVersion, "", &version);
  const cu::AllocationProp prop = Prop(device, options.device);

  std::string sizes;
  for (const std::int64_t mib : {2, 16, 64}) {
    Samples samples;
    for (int round = 0; round < options.rounds; ++round) {
      KVPAGE_RETURN_IF_ERROR(Round(*driver, prop, options.device, mib * kMiB, options.blocks, &samples));
    }
    sizes += (sizes.empty() ? "" : ", ") + ("\"" + std::to_string(mib) + "\": ") + samples.ToJson();
  }
  std::string copy;
  KVPAGE_RETURN_IF_ERROR(CopyBandwidth(*driver, options.copy_mib * kMiB, &copy));
  std::printf(R"({"device": "%s", "driver": %d, "granularity": %lld, "recommended_granularity": %lld, )"
              R"("blocks": %lld, "rounds": %d, "fake": %s, "copy": %s, "microseconds_by_mib": {%s}})"
              "\n",
              device.name.c_str(), version, static_cast<long long>(device.granularity),
              static_cast<long long>(device.recommended_granularity), static_cast<long long>(options.blocks),
              options.rounds, options.fake ? "true" : "false", copy.c_str(), sizes.c_str());
  return {};
}

bool Parse(int count, char** values, Options* options) {
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(values[i], "--fake") == 0) {
      options->fake = true;
      continue;
    }
    if (i + 1 == count) return false;
    char* end = nullptr;
    const long number = std::strtol(values[i + 1], &end, 10);
    if (end == values[i + 1] || *end != '\0' || number < 0 || (number == 0 && std::strcmp(values[i], "--device") != 0))
      return false;
    if (std::strcmp(values[i], "--device") == 0) {
      options->device = static_cast<int>(number);
    } else if (std::strcmp(values[i], "--blocks") == 0) {
      options->blocks = number;
    } else if (std::strcmp(values[i], "--rounds") == 0) {
      options->rounds = static_cast<int>(number);
    } else if (std::strcmp(values[i], "--copy-mib") == 0) {
      options->copy_mib = number;
    } else {
      return false;
    }
    ++i;
  }
  return true;
}

}  // namespace
}  // namespace kvpage

int main(int count, char** values) {
  kvpage::Options options;
  if (!kvpage::Parse(count, values, &options)) {
    std::fprintf(stderr, "usage: %s [--fake] [--device N] [--blocks N] [--rounds N] [--copy-mib N]\n", values[0]);
    return 2;
  }
  if (const kvpage::Status status = kvpage::Run(options); !status.ok()) {
    std::fprintf(stderr, "%s\n", status.message().c_str());
    return 1;
  }
  return 0;
}
