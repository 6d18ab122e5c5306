// The fake driver's state, shared by its entry points (fake_driver.cc, fake_memory.cc, fake_shareable.cc,
// fake_streams.cc, fake_capture.cc).
#ifndef KVPAGE_TESTING_FAKE_IMPL_H_
#define KVPAGE_TESTING_FAKE_IMPL_H_

#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "testing/fake_driver.h"

namespace kvpage {

struct FakeDriver::Impl {
  struct Fault {
    cu::Call call;      // kCount: any call
    std::int64_t left;  // calls before it takes effect
    std::int64_t times;
    cu::Result result;
  };
  struct PrimaryContext {
    int device = 0;
    std::int64_t retains = 0;
  };
  struct Handle {
    int device = 0;
    std::size_t bytes = 0;
    std::int64_t file_offset = 0;
    std::int64_t mappings = 0;
    bool released = false;
    bool shareable = false;
    bool imported = false;
    int own_fd = -1;          // memfd that holds only this memory, once it was shared; otherwise -1
    std::uint64_t inode = 0;  // of own_fd: handles of one process with the same inode refer to the same memory
  };
  struct Mapping {
    std::size_t bytes = 0;
    cu::MemHandle handle = 0;
    cu::Access access = cu::Access::kNone;
  };
  struct Allocation {
    std::size_t bytes = 0;
    int device = 0;
  };
  struct Capture;
  struct EventState {
    int device = -1;
    std::shared_ptr<Capture> capture;  // in which it was last recorded
    std::uint64_t recorded = 0;        // number of times
    std::uint64_t completed = 0;       // the latest record that was reached
  };
  struct Work {
    std::function<void()> run;
    bool locked = true;  // run with the mutex held; false for kernels
    std::shared_ptr<EventState> waits_for;
    std::uint64_t record = 0;  // the record of waits_for
  };
  // Work that is being captured into a graph.
  struct Capture {
    std::thread::id owner;
    CaptureMode mode = CaptureMode::kGlobal;
    bool invalidated = false;
    std::vector<Work> work;
  };
  struct StreamState {
    std::deque<Work> queue;
    std::shared_ptr<Capture> capture;
    int device = -1;        // -1: the null stream, for every device
    bool blocking = false;  // synchronises with the null stream
    bool held = false;
    bool running = false;
    bool destroyed = false;
    bool idle() const { return queue.empty() && !running; }
  };

  explicit Impl(const Options& o);
  ~Impl();

  // Runs work on all streams until none can continue.
  void Pump(std::unique_lock<std::mutex>* lock);
  cu::Result Queue(cu::Stream stream, Work work, std::unique_lock<std::mutex>* lock);
  bool Exists(cu::Stream stream) const;
  cu::Result Violation(const std::string& rule, cu::Result result = cu::Result::kInvalidValue);
  // For a call that breaks the captures of all streams for which `broken`(stream) is true: a violation if there are
  // any.
  cu::Result CheckCaptures(const std::string& call, cu::Result result,
                           const std::function<bool(const StreamState&)>& broken);
  // The same for calls that the driver documents as potentially unsafe during a capture.
  cu::Result CheckUnsafe(const std::string& call);
  // The mode of the calling thread; in relaxed mode none of its calls is unsafe.
  static cu::CaptureMode& ThreadMode();
  // The same for work on the null stream, which waits for the work of blocking streams.
  cu::Result CheckNullStream(const std::string& call, cu::Stream stream);
  bool Idle() const;          // whether all streams are idle
  int CurrentDevice() const;  // -1: no context is current
  // A violation unless the device's context is current; -1 accepts that of any device.
  cu::Result CheckDevice(const std::string& call, int device);
  int DeviceOf(cu::DevicePtr address) const;  // -1 if it belongs to none
  // Whether the device may read the whole range; with `write`, also write it.
  bool Accessible(cu::DevicePtr address, std::size_t bytes, bool write) const;
  bool IsPinned(const void* host, std::size_t bytes) const;
  void FreeHandle(cu::MemHandle handle);
  // The file that holds the handle's memory.
  int FileOf(const Handle& handle) const { return handle.own_fd >= 0 ? handle.own_fd : fd; }
  // Moves a handle's memory to a separate file and keeps its mappings. Returns false if the system refuses.
  bool MakeShared(cu::MemHandle handle);
  // Whether another handle of this process refers to the same memory.
  bool HasTwin(cu::MemHandle handle) const;
  bool Take(int device, std::size_t bytes);  // false if out of memory

  const Options options;
  mutable std::mutex mutex;
  std::condition_variable changed;

  std::array<std::int64_t, static_cast<std::size_t>(cu::Call::kCount)> counts{};
  std::int64_t total = 0;
  std::vector<Fault> faults;
  std::int64_t faults_answered = 0;
  bool initialized = false;
  std::int64_t pushed = 0;
  std::int64_t released_while_mapped = 0;
  std::int64_t violations = 0;
  std::string first_violation;

  std::vector<PrimaryContext> contexts;  // [devices]
  std::vector<std::int64_t> used;        // [devices] bytes
  int fd = -1;                           // memfd with the memory of handles, in ranges that are never reused
  std::int64_t file_bytes = 0;
  cu::MemHandle last_handle = 0x1000;
  std::map<cu::DevicePtr, std::size_t> reservations;
  std::map<cu::MemHandle, Handle> handles;
  std::map<cu::DevicePtr, Mapping> mappings;
  std::map<cu::DevicePtr, Allocation> allocations;
  std::map<void*, std::size_t> host_allocations;
  std::uintptr_t last_id = 0x1000;  // for streams and events
  std::map<cu::Stream, StreamState> streams;
  std::map<cu::Event, std::shared_ptr<EventState>> events;
};

struct FakeDriver::Graph {
  std::vector<Impl::Work> work;
};

namespace cu::fake {

#define KVPAGE_DECLARE(name, symbol, args) Result name args;
KVPAGE_DRIVER_CALLS(KVPAGE_DECLARE)
#undef KVPAGE_DECLARE

enum class Needs { kNothing, kInit, kContext };

// Every entry point begins by creating one: it takes the lock, counts the call, and returns an injected fault or a rule
// violation.
class Entry {
 public:
  Entry(Call call, Needs needs);
  bool ok() const { return result_ == Result::kSuccess; }
  Result result() const { return result_; }
  FakeDriver::Impl& fake() const { return *fake_; }
  FakeDriver::Impl* operator->() const { return fake_; }
  std::unique_lock<std::mutex>* lock() { return &lock_; }

 private:
  FakeDriver::Impl* fake_;
  std::unique_lock<std::mutex> lock_;
  Result result_ = Result::kSuccess;
};

// First line of every entry point.
#define KVPAGE_ENTRY(name, needs)              \
  Entry entry(Call::k##name, Needs::k##needs); \
  if (!entry.ok()) return entry.result()

// Returns from an entry point unless the context of this device is current (-1: of any device).
#define KVPAGE_CHECK_DEVICE(symbol, device) \
  if (const Result wrong = entry->CheckDevice(symbol, device); wrong != Result::kSuccess) return wrong

}  // namespace cu::fake
}  // namespace kvpage

#endif  // KVPAGE_TESTING_FAKE_IMPL_H_
