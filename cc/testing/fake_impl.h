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
    cu::Call call;      // kCount: any
    std::int64_t left;  // calls until it strikes
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
    int own_fd = -1;          // of a memfd that has only this memory, once it was shared; else -1
    std::uint64_t inode = 0;  // of that memfd: handles of one process with the same one are the same memory
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
    std::shared_ptr<Capture> capture;  // in which it was recorded last
    std::uint64_t recorded = 0;        // how often
    std::uint64_t completed = 0;       // the newest record that has been reached
  };
  struct Work {
    std::function<void()> run;
    bool locked = true;  // runs with the mutex held; a kernel does not
    std::shared_ptr<EventState> waits_for;
    std::uint64_t record = 0;  // of waits_for
  };
  // Work on its way into a graph.
  struct Capture {
    std::thread::id owner;
    CaptureMode mode = CaptureMode::kGlobal;
    bool invalidated = false;
    std::vector<Work> work;
  };
  struct StreamState {
    std::deque<Work> queue;
    std::shared_ptr<Capture> capture;
    int device = -1;        // -1: the null stream, of every device
    bool blocking = false;  // synchronises with the null stream
    bool held = false;
    bool running = false;
    bool destroyed = false;
    bool idle() const { return queue.empty() && !running; }
  };

  explicit Impl(const Options& o);
  ~Impl();

  // Runs what may run on all streams until nothing can.
  void Pump(std::unique_lock<std::mutex>* lock);
  cu::Result Queue(cu::Stream stream, Work work, std::unique_lock<std::mutex>* lock);
  bool Exists(cu::Stream stream) const;
  cu::Result Violation(const std::string& rule, cu::Result result = cu::Result::kInvalidValue);
  // A call that breaks the captures of all streams for which `broken`(stream) holds: a violation if there are any.
  cu::Result CheckCaptures(const std::string& call, cu::Result result,
                           const std::function<bool(const StreamState&)>& broken);
  // The same for calls that the driver documents as potentially unsafe during a capture.
  cu::Result CheckUnsafe(const std::string& call);
  // The calling thread's; in relaxed mode no call of its is unsafe.
  static cu::CaptureMode& ThreadMode();
  // The same for work on the null stream, which waits for the work of blocking streams.
  cu::Result CheckNullStream(const std::string& call, cu::Stream stream);
  bool Idle() const;          // all streams
  int CurrentDevice() const;  // -1: no context is current
  // A violation unless the device's context is current; -1: any device's may be.
  cu::Result CheckDevice(const std::string& call, int device);
  int DeviceOf(cu::DevicePtr address) const;  // -1: of none
  // Whether the whole range may be read by the device, or written too.
  bool Accessible(cu::DevicePtr address, std::size_t bytes, bool write) const;
  bool IsPinned(const void* host, std::size_t bytes) const;
  void FreeHandle(cu::MemHandle handle);
  // Where a handle's memory lies in which file.
  int FileOf(const Handle& handle) const { return handle.own_fd >= 0 ? handle.own_fd : fd; }
  // Gives a handle's memory a file of its own; what is mapped stays so. False: the system refuses.
  bool MakeShared(cu::MemHandle handle);
  // Whether another handle of this process stands for the same memory.
  bool HasTwin(cu::MemHandle handle) const;
  bool Take(int device, std::size_t bytes);  // false: out of memory

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
  int fd = -1;                           // what handles stand for: ranges of one memfd, never used twice
  std::int64_t file_bytes = 0;
  cu::MemHandle last_handle = 0x1000;
  std::map<cu::DevicePtr, std::size_t> reservations;
  std::map<cu::MemHandle, Handle> handles;
  std::map<cu::DevicePtr, Mapping> mappings;
  std::map<cu::DevicePtr, Allocation> allocations;
  std::map<void*, std::size_t> host_allocations;
  std::uintptr_t last_id = 0x1000;  // of streams and events
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

// Every entry point begins with one: takes the lock, counts the call, and answers an injected fault or a broken rule.
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

// First line of an entry point.
#define KVPAGE_ENTRY(name, needs)              \
  Entry entry(Call::k##name, Needs::k##needs); \
  if (!entry.ok()) return entry.result()

// Ends an entry point unless the context of this device (-1: any) is current.
#define KVPAGE_CHECK_DEVICE(symbol, device) \
  if (const Result wrong = entry->CheckDevice(symbol, device); wrong != Result::kSuccess) return wrong

}  // namespace cu::fake
}  // namespace kvpage

#endif  // KVPAGE_TESTING_FAKE_IMPL_H_
