#include "ffi/cpu/shard_faults.h"

#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "ffi/handlers.h"

namespace kvpage {
namespace {

constexpr std::size_t kKept = 256;
constexpr char kNote[] = " (numbers of tokens are those of one device, which has a share of every sequence)";

struct Faults {
  std::mutex mutex;
  std::int32_t last = 0;
  std::map<std::int32_t, std::pair<ffi::ErrorCode, std::string>> errors;
};

// Never destroyed: programs may still run while the process exits.
Faults& TheFaults() {
  static auto* const faults = new Faults;
  return *faults;
}

// The operands after the number are also results, which are returned only if no device has failed.
ffi::Error RaiseFault(S32 fault, ffi::RemainingArgs operands, ffi::RemainingRets results) {
  if (ffi::Error error = FaultOf(fault.typed_data()[0]); error.failure()) return error;
  for (std::size_t i = 0; i < results.size(); ++i) {
    const ffi::ErrorOr<Any> operand = operands.get<Any>(i);
    ffi::ErrorOr<ffi::Result<Any>> result = results.get<Any>(i);
    if (operand.has_error()) return operand.error();
    if (result.has_error()) return result.error();
    // They share a buffer.
    if ((*result)->untyped_data() == operand->untyped_data()) continue;
    std::memcpy((*result)->untyped_data(), operand->untyped_data(), operand->size_bytes());
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kRaiseFault, RaiseFault, ffi::Ffi::Bind().Arg<S32>().RemainingArgs().RemainingRets());

}  // namespace

std::int32_t NoteFault(const ffi::Error& error) {
  if (error.success()) return 0;
  Faults& faults = TheFaults();
  const std::lock_guard<std::mutex> lock(faults.mutex);
  faults.last = faults.last == std::numeric_limits<std::int32_t>::max() ? 1 : faults.last + 1;
  faults.errors[faults.last] = {error.errc().value_or(ffi::ErrorCode::kInternal), error.message() + kNote};
  if (faults.errors.size() > kKept) faults.errors.erase(faults.errors.begin());
  return faults.last;
}

ffi::Error FaultOf(std::int32_t number) {
  if (number == 0) return ffi::Error::Success();
  Faults& faults = TheFaults();
  const std::lock_guard<std::mutex> lock(faults.mutex);
  const auto found = faults.errors.find(number);
  if (found == faults.errors.end()) return ffi::Error::Internal("a device of the mesh failed");
  return {found->second.first, found->second.second};
}

std::vector<Target> FaultTargets() { return {{"jax_kvpage_raise_fault", kRaiseFault}}; }

}  // namespace kvpage
