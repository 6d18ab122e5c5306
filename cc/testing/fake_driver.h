// FakeDriver: the driver's entry points over memfd and mmap, for tests on machines without a GPU.
//
// Device memory is host memory, so the process can read and write device addresses. The rules of the real driver are
// checked, and violations return its error codes: granularity, one unmap per map, no access before it is enabled (it
// would fault), no mapping over a mapping, a current context, no call that a stream capture forbids. One rule is
// stricter than in the real driver: the current context must be that of the device whose memory, stream or event a call
// uses (pinned memory and address space belong to no device). Every call is counted, and any call can be made to fail.
// New memory holds 0xFF bytes (NaN), never zeros. Work on a stream runs at once unless the stream is held or captured.
//
// cuMemExportToShareableHandle returns descriptors of memfds, which another process with a fake driver can import.
// Descriptors that have not been imported are not counted anywhere; the real driver does not report their number
// either.
//
// The real driver's functions have no `this` parameter, so only one FakeDriver can exist at a time. All calls are
// thread-safe.
#ifndef KVPAGE_TESTING_FAKE_DRIVER_H_
#define KVPAGE_TESTING_FAKE_DRIVER_H_

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/status.h"
#include "vmm/driver.h"

namespace kvpage {

class FakeDriver {
 public:
  struct Options {
    int devices = 1;
    std::int64_t device_bytes = std::int64_t{1} << 30;  // per device, for blocks and allocations
    std::int64_t granularity = std::int64_t{2} << 20;   // a multiple of the page size
    bool virtual_memory = true;
    bool posix_handles = true;  // false: the devices report that they do not support them
    // cuMemCreate refuses shareable handles although the device reports support, as in some containers.
    bool posix_handles_denied = false;
    bool read_only_access = true;  // false: cuMemSetAccess refuses read-only access
    // cuMemMap, cuMemUnmap and cuMemSetAccess return only when every stream is idle, which the real driver may do.
    bool mapping_waits = false;
  };

  // Fails while another FakeDriver exists.
  static Status Make(const Options& options, std::unique_ptr<FakeDriver>* out);
  ~FakeDriver();
  FakeDriver(const FakeDriver&) = delete;
  FakeDriver& operator=(const FakeDriver&) = delete;

  const Driver& driver() const;

  // ---- counts ----
  std::int64_t calls(cu::Call call) const;
  std::int64_t total_calls() const;  // without those that pop a context or ask for an error name

  // ---- fault injection ----
  // The n-th call of this kind (1 is the next one) and the `times - 1` calls after it do nothing and return `result`.
  void FailAt(cu::Call call, std::int64_t n, cu::Result result, std::int64_t times = 1);
  // The same for the n-th call of any kind that total_calls counts.
  void FailAtAny(std::int64_t n, cu::Result result, std::int64_t times = 1);
  void ClearFaults();
  std::int64_t faults() const;  // number of injected faults so far

  // ---- streams ----
  // From now on, work queued on the stream (nullptr: the null stream) waits for ReleaseStream. So do events recorded on
  // it, and whoever synchronises with it blocks until then.
  void HoldStream(cu::Stream stream);
  void ReleaseStream(cu::Stream stream);
  // Queues a substitute for a kernel, which runs in stream order.
  void Enqueue(cu::Stream stream, std::function<void()> work);

  // ---- captures ----
  // CUstreamCaptureMode: which threads a capture restricts in addition to the one that began it.
  enum class CaptureMode { kGlobal, kThreadLocal, kRelaxed };
  // From now on, the stream's work is added to a graph instead of running. The calling thread owns the capture.
  void BeginCapture(cu::Stream stream, CaptureMode mode);
  struct Graph;
  // Returns null if the capture was invalidated by a forbidden call.
  std::shared_ptr<Graph> EndCapture(cu::Stream stream);
  // Queues the graph's work on a stream.
  void LaunchGraph(const std::shared_ptr<Graph>& graph, cu::Stream stream);
  // Acts like the module load that the CUDA runtime makes when a kernel is first used.
  cu::Result LoadModule();

  // ---- remaining resources ----
  struct State {
    std::int64_t reservations = 0, handles = 0, mappings = 0, allocations = 0, host_allocations = 0;
    std::int64_t imported = 0;                           // number of handles that come from other pools or processes
    std::int64_t streams = 0, events = 0, contexts = 0;  // contexts: retained and not yet released
    std::int64_t pushed = 0;                             // contexts pushed and not yet popped
    std::int64_t queued = 0;                             // queued work that has not run
    std::int64_t used_bytes = 0;                         // over all devices
    std::int64_t released_while_mapped = 0;              // allowed by the real driver, but this library must not do it
    std::int64_t violations = 0;                         // calls that broke a rule
    std::string first_violation;
    bool empty() const;  // nothing is alive, and no rule was broken
    std::string ToString() const;
  };
  State Report() const;

  struct Impl;

 private:
  explicit FakeDriver(const Options& options);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvpage

#endif  // KVPAGE_TESTING_FAKE_DRIVER_H_
