#include "testing/fake_driver.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <utility>

#include "testing/fake_impl.h"
#include "vmm/limits.h"

namespace kvpage {
namespace {

std::atomic<FakeDriver::Impl*> g_fake{nullptr};

// Calls that CUDA restricts during captures that are not in relaxed mode ("potentially unsafe API calls"). CUDA's list
// is not public; these calls allocate, free, change mappings, or query work outside of the capture.
bool Unsafe(cu::Call call) {
  switch (call) {
    case cu::Call::kMemAlloc:
    case cu::Call::kMemFree:
    case cu::Call::kMemHostAlloc:
    case cu::Call::kMemFreeHost:
    case cu::Call::kMemCreate:
    case cu::Call::kMemRelease:
    case cu::Call::kMemMap:
    case cu::Call::kMemUnmap:
    case cu::Call::kMemSetAccess:
    case cu::Call::kMemExportToShareableHandle:
    case cu::Call::kMemImportFromShareableHandle:
    case cu::Call::kEventQuery:
    case cu::Call::kEventSynchronize:
      return true;
    default:
      return false;
  }
}

bool Counted(cu::Call call) {
  return call != cu::Call::kCtxPopCurrent && call != cu::Call::kGetErrorName && call != cu::Call::kGetErrorString;
}

}  // namespace

FakeDriver::Impl::Impl(const Options& o) : options(o), contexts(o.devices), used(o.devices, 0) {
  for (int device = 0; device < o.devices; ++device) contexts[device].device = device;
  streams[nullptr] = {};
  fd = memfd_create("fake_driver", MFD_CLOEXEC);
}

FakeDriver::Impl::~Impl() {
  for (const auto& [address, bytes] : reservations) munmap(reinterpret_cast<void*>(address), bytes);
  for (const auto& [address, allocation] : allocations) munmap(reinterpret_cast<void*>(address), allocation.bytes);
  for (const auto& [address, bytes] : host_allocations) munmap(address, bytes);
  for (const auto& [handle, entry] : handles) {
    if (entry.own_fd >= 0) close(entry.own_fd);
  }
  if (fd >= 0) close(fd);
}

cu::Result FakeDriver::Impl::Violation(const std::string& rule, cu::Result result) {
  if (violations++ == 0) first_violation = rule;
  return result;
}

Status FakeDriver::Make(const Options& options, std::unique_ptr<FakeDriver>* out) {
  if (options.devices < 0 || options.granularity <= 0 || options.granularity % PageBytes() != 0) {
    return InvalidArgument("fake driver: wanted devices >= 0 and a granularity that is a multiple of " +
                           std::to_string(PageBytes()) + ", got " + std::to_string(options.devices) + " and " +
                           std::to_string(options.granularity));
  }
  std::unique_ptr<FakeDriver> fake(new FakeDriver(options));
  Impl* none = nullptr;
  if (fake->impl_->fd < 0) return Internal("fake driver: memfd_create failed");
  if (!g_fake.compare_exchange_strong(none, fake->impl_.get())) {
    return FailedPrecondition("fake driver: another one lives; destroy it first");
  }
  fake->impl_->initialized = true;
  *out = std::move(fake);
  return {};
}

FakeDriver::FakeDriver(const Options& options) : impl_(std::make_unique<Impl>(options)) {}

FakeDriver::~FakeDriver() {
  Impl* self = impl_.get();
  g_fake.compare_exchange_strong(self, nullptr);
}

const Driver& FakeDriver::driver() const {
  static const Driver table = [] {
    Driver driver;
#define KVPAGE_ENTER(name, symbol, args) driver.name = &cu::fake::name;
    KVPAGE_DRIVER_CALLS(KVPAGE_ENTER)
#undef KVPAGE_ENTER
    return driver;
  }();
  return table;
}

std::int64_t FakeDriver::calls(cu::Call call) const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->counts[static_cast<std::size_t>(call)];
}

std::int64_t FakeDriver::total_calls() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->total;
}

void FakeDriver::FailAt(cu::Call call, std::int64_t n, cu::Result result, std::int64_t times) {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->faults.push_back({call, n, times, result});
}

void FakeDriver::FailAtAny(std::int64_t n, cu::Result result, std::int64_t times) {
  FailAt(cu::Call::kCount, n, result, times);
}

void FakeDriver::ClearFaults() {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->faults.clear();
}

std::int64_t FakeDriver::faults() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->faults_answered;
}

FakeDriver::State FakeDriver::Report() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  State state;
  state.reservations = static_cast<std::int64_t>(impl_->reservations.size());
  state.handles = static_cast<std::int64_t>(impl_->handles.size());
  for (const auto& [handle, entry] : impl_->handles) state.imported += entry.imported;
  state.mappings = static_cast<std::int64_t>(impl_->mappings.size());
  state.allocations = static_cast<std::int64_t>(impl_->allocations.size());
  state.host_allocations = static_cast<std::int64_t>(impl_->host_allocations.size());
  for (const auto& [stream, entry] : impl_->streams) {
    state.streams += stream != nullptr && !entry.destroyed;
    state.queued += static_cast<std::int64_t>(entry.queue.size()) + entry.running;
  }
  state.events = static_cast<std::int64_t>(impl_->events.size());
  for (const Impl::PrimaryContext& context : impl_->contexts) state.contexts += context.retains;
  for (std::int64_t bytes : impl_->used) state.used_bytes += bytes;
  state.pushed = impl_->pushed;
  state.released_while_mapped = impl_->released_while_mapped;
  state.violations = impl_->violations;
  state.first_violation = impl_->first_violation;
  return state;
}

bool FakeDriver::State::empty() const {
  return reservations == 0 && handles == 0 && mappings == 0 && allocations == 0 && host_allocations == 0 &&
         streams == 0 && events == 0 && contexts == 0 && pushed == 0 && queued == 0 && used_bytes == 0 &&
         released_while_mapped == 0 && violations == 0;
}

std::string FakeDriver::State::ToString() const {
  std::string text;
  const auto add = [&](const char* name, std::int64_t value) {
    if (value != 0) text += (text.empty() ? "" : ", ") + std::to_string(value) + " " + name;
  };
  add("reservations", reservations);
  add("handles", handles);
  add("of them imported", imported);
  add("mappings", mappings);
  add("allocations", allocations);
  add("host allocations", host_allocations);
  add("streams", streams);
  add("events", events);
  add("retained contexts", contexts);
  add("pushed contexts", pushed);
  add("queued pieces of work", queued);
  add("bytes used", used_bytes);
  add("handles released while mapped", released_while_mapped);
  add("violations", violations);
  if (violations > 0) text += " (the first: " + first_violation + ")";
  return text.empty() ? "nothing" : text;
}

namespace cu::fake {

Entry::Entry(Call call, Needs needs) : fake_(g_fake.load()) {
  if (fake_ == nullptr) {
    result_ = Result::kDeinitialized;
    return;
  }
  lock_ = std::unique_lock<std::mutex>(fake_->mutex);
  ++fake_->counts[static_cast<std::size_t>(call)];
  fake_->total += Counted(call);
  for (FakeDriver::Impl::Fault& fault : fake_->faults) {
    const bool meant = fault.call == call || (fault.call == Call::kCount && Counted(call));
    if (!meant || fault.times <= 0 || --fault.left > 0) continue;
    --fault.times;
    ++fake_->faults_answered;
    result_ = fault.result;
    return;
  }
  if (needs != Needs::kNothing && !fake_->initialized) {
    result_ = fake_->Violation(std::string(Symbol(call)) + " before cuInit", Result::kNotInitialized);
  } else if (needs == Needs::kContext && fake_->CurrentDevice() < 0) {
    result_ = fake_->Violation(std::string(Symbol(call)) + " without a current context", Result::kInvalidContext);
  } else if (Unsafe(call)) {
    result_ = fake_->CheckUnsafe(Symbol(call));
  }
}

}  // namespace cu::fake
}  // namespace kvpage
