// FakeDriver: the driver's entry points over memfd and mmap, for tests on machines without a GPU.
//
// Device memory is host memory, so device addresses may be read and written by the process. The rules of the real
// driver are checked and answered with its codes: granularity, one unmap per map, no access before it is set (it would
// fault), no mapping over a mapping, a current context, no call that a stream capture forbids. More strictly than by
// the real driver the context must be that of the device whose memory, stream or event a call is about: pinned memory
// and address space belong to none. Every call is counted, and any can be made to fail. New memory holds 0xFF bytes
// (NaN), never zeros. Work on a stream runs at once unless the stream is held back or captured.
//
// What cuMemExportToShareableHandle gives are descriptors of memfds, so that another process with a fake driver can
// import them. Descriptors that wait to be imported count nowhere: the real driver does not say either how many there
// are.
//
// The real driver's functions have no room for a "this": one FakeDriver lives at a time. All calls may come from any
// thread.
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
    std::int64_t device_bytes = std::int64_t{1} << 30;  // memory of each, reserved for blocks and allocations
    std::int64_t granularity = std::int64_t{2} << 20;   // a multiple of the page size
    bool virtual_memory = true;
    bool posix_handles = true;  // false: the devices say that they cannot
    // cuMemCreate refuses shareable handles although the device says that it can: what some containers do.
    bool posix_handles_denied = false;
    bool read_only_access = true;  // false: cuMemSetAccess refuses to let a device read only
    // cuMemMap, cuMemUnmap and cuMemSetAccess return only when every stream is idle, as the real driver may do.
    bool mapping_waits = false;
  };

  // Fails while another one lives.
  static Status Make(const Options& options, std::unique_ptr<FakeDriver>* out);
  ~FakeDriver();
  FakeDriver(const FakeDriver&) = delete;
  FakeDriver& operator=(const FakeDriver&) = delete;

  const Driver& driver() const;

  // ---- counts ----
  std::int64_t calls(cu::Call call) const;
  std::int64_t total_calls() const;  // popping a context and asking for an error's name apart

  // ---- faults ----
  // The n-th call (1: the next one) of this kind, and `times - 1` after it, do nothing and answer `result`.
  void FailAt(cu::Call call, std::int64_t n, cu::Result result, std::int64_t times = 1);
  // The same for the n-th call of any kind that total_calls counts.
  void FailAtAny(std::int64_t n, cu::Result result, std::int64_t times = 1);
  void ClearFaults();
  std::int64_t faults() const;  // answered so far

  // ---- streams ----
  // Work queued on the stream (nullptr: the null stream) from now on waits for ReleaseStream; so do events recorded on
  // it, and whoever synchronises with it blocks until then.
  void HoldStream(cu::Stream stream);
  void ReleaseStream(cu::Stream stream);
  // Stands for a kernel: runs in the stream's order.
  void Enqueue(cu::Stream stream, std::function<void()> work);

  // ---- captures ----
  // CUstreamCaptureMode: whose calls a capture restricts besides those of the thread that began it.
  enum class CaptureMode { kGlobal, kThreadLocal, kRelaxed };
  // From now on the stream's work goes into a graph and does not run. The calling thread owns the capture.
  void BeginCapture(cu::Stream stream, CaptureMode mode);
  struct Graph;
  // Null: a call that the capture forbids has invalidated it.
  std::shared_ptr<Graph> EndCapture(cu::Stream stream);
  // Queues the graph's work on a stream.
  void LaunchGraph(const std::shared_ptr<Graph>& graph, cu::Stream stream);
  // Stands for the module load that the CUDA runtime makes at a kernel's first use.
  cu::Result LoadModule();

  // ---- what is left ----
  struct State {
    std::int64_t reservations = 0, handles = 0, mappings = 0, allocations = 0, host_allocations = 0;
    std::int64_t imported = 0;                           // of the handles, those of other pools or processes
    std::int64_t streams = 0, events = 0, contexts = 0;  // contexts: retained and not released
    std::int64_t pushed = 0;                             // contexts pushed and not popped
    std::int64_t queued = 0;                             // pieces of work that have not run
    std::int64_t used_bytes = 0;                         // of all devices
    std::int64_t released_while_mapped = 0;              // the real driver allows it; this library must not do it
    std::int64_t violations = 0;                         // calls that broke a rule
    std::string first_violation;
    bool empty() const;  // nothing alive, nothing wrong
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
