// The fake driver's streams and events: queues that run at once, or when a test allows it.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "testing/fake_impl.h"

namespace kvpage {

bool FakeDriver::Impl::Exists(cu::Stream stream) const {
  const auto it = streams.find(stream);
  return it != streams.end() && !it->second.destroyed;
}

cu::Result FakeDriver::Impl::Queue(cu::Stream stream, Work work, std::unique_lock<std::mutex>* lock) {
  StreamState& state = streams.at(stream);
  if (state.capture != nullptr) {
    state.capture->work.push_back(std::move(work));
    return cu::Result::kSuccess;
  }
  state.queue.push_back(std::move(work));
  Pump(lock);
  return cu::Result::kSuccess;
}

void FakeDriver::Impl::Pump(std::unique_lock<std::mutex>* lock) {
  for (bool progress = true; progress;) {
    progress = false;
    for (auto it = streams.begin(); it != streams.end() && !progress; ++it) {
      StreamState& stream = it->second;
      if (stream.held || stream.running || stream.queue.empty()) continue;
      const Work& head = stream.queue.front();
      if (head.waits_for != nullptr && head.waits_for->completed < head.record) continue;
      const Work work = std::move(stream.queue.front());
      stream.queue.pop_front();
      progress = true;
      if (work.run && work.locked) {
        work.run();
      } else if (work.run) {
        stream.running = true;
        lock->unlock();
        work.run();
        lock->lock();
        stream.running = false;
      }
      if (stream.destroyed && stream.idle()) streams.erase(it);
      changed.notify_all();
      break;  // `it` may be invalid, and streams may have been added
    }
  }
}

void FakeDriver::HoldStream(cu::Stream stream) {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->streams.at(stream).held = true;
}

void FakeDriver::ReleaseStream(cu::Stream stream) {
  std::unique_lock<std::mutex> lock(impl_->mutex);
  impl_->streams.at(stream).held = false;
  impl_->Pump(&lock);
}

void FakeDriver::Enqueue(cu::Stream stream, std::function<void()> work) {
  std::unique_lock<std::mutex> lock(impl_->mutex);
  Impl::Work kernel;
  kernel.run = std::move(work);
  kernel.locked = false;
  static_cast<void>(impl_->Queue(stream, std::move(kernel), &lock));
}

namespace cu::fake {
namespace {

using Work = FakeDriver::Impl::Work;

// Aligned words are copied in one piece, as by a copy engine: a kernel may write them at the same time.
void CopyBytes(void* to, const void* from, std::size_t bytes) {
  const auto places = reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from);
  if (bytes != sizeof(std::uint32_t) || places % sizeof(std::uint32_t) != 0) {
    std::memmove(to, from, bytes);
    return;
  }
  const std::uint32_t word = __atomic_load_n(static_cast<const std::uint32_t*>(from), __ATOMIC_SEQ_CST);
  __atomic_store_n(static_cast<std::uint32_t*>(to), word, __ATOMIC_SEQ_CST);
}

struct Range {
  DevicePtr address = 0;
  std::size_t bytes = 0;
  bool write = false;
};

// Queues a copy or a fill of device memory. Ranges are checked twice, because they may be unmapped before the work
// runs.
Result QueueAccess(Entry* entry, const char* what, std::vector<Range> ranges, std::function<void()> access,
                   Stream stream) {
  FakeDriver::Impl* fake = &entry->fake();
  if (!fake->Exists(stream)) return fake->Violation(std::string(what) + ": no such stream", Result::kInvalidHandle);
  if (const Result result = fake->CheckNullStream(what, stream); result != Result::kSuccess) return result;
  const Result wrong = fake->CheckDevice(what, fake->streams.at(stream).device);
  if (wrong != Result::kSuccess) return wrong;
  for (const auto& [address, bytes, write] : ranges) {
    const Result elsewhere = fake->CheckDevice(std::string(what) + " of memory", fake->DeviceOf(address));
    if (elsewhere != Result::kSuccess) return elsewhere;
    if (!fake->Accessible(address, bytes, write)) {
      return fake->Violation(std::string(what) + ": memory that is not mapped or may not be accessed");
    }
  }
  Work work;
  work.run = [fake, what, ranges = std::move(ranges), access = std::move(access)] {
    for (const auto& [address, bytes, write] : ranges) {
      if (!fake->Accessible(address, bytes, write)) {
        static_cast<void>(fake->Violation(std::string(what) + ": its memory went before its turn came"));
        return;
      }
    }
    access();
  };
  return fake->Queue(stream, std::move(work), entry->lock());
}

// An event that was recorded in a capture represents a graph node, and nobody can wait for it.
Result CapturedEvent(Entry* entry, const char* what, const FakeDriver::Impl::EventState& event) {
  event.capture->invalidated = true;
  return (*entry)->Violation(std::string(what) + " of an event that was recorded in a capture", Result::kCapturedEvent);
}

}  // namespace

Result MemcpyHtoDAsync(DevicePtr to, const void* from, std::size_t bytes, Stream stream) {
  KVPAGE_ENTRY(MemcpyHtoDAsync, Context);
  // Pageable memory is read before the call returns, pinned memory when the copy runs.
  std::vector<char> staged;
  const bool pinned = entry->IsPinned(from, bytes);
  if (!pinned) staged.assign(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
  return QueueAccess(
      &entry, "cuMemcpyHtoDAsync", {{to, bytes, true}},
      [=, staged = std::move(staged)] { CopyBytes(reinterpret_cast<void*>(to), pinned ? from : staged.data(), bytes); },
      stream);
}

Result MemcpyDtoHAsync(void* to, DevicePtr from, std::size_t bytes, Stream stream) {
  KVPAGE_ENTRY(MemcpyDtoHAsync, Context);
  return QueueAccess(
      &entry, "cuMemcpyDtoHAsync", {{from, bytes, false}},
      [=] { CopyBytes(to, reinterpret_cast<const void*>(from), bytes); }, stream);
}

Result MemcpyDtoDAsync(DevicePtr to, DevicePtr from, std::size_t bytes, Stream stream) {
  KVPAGE_ENTRY(MemcpyDtoDAsync, Context);
  return QueueAccess(
      &entry, "cuMemcpyDtoDAsync", {{to, bytes, true}, {from, bytes, false}},
      [=] { CopyBytes(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes); }, stream);
}

Result MemsetD8Async(DevicePtr to, unsigned char byte, std::size_t bytes, Stream stream) {
  KVPAGE_ENTRY(MemsetD8Async, Context);
  return QueueAccess(
      &entry, "cuMemsetD8Async", {{to, bytes, true}}, [=] { std::memset(reinterpret_cast<void*>(to), byte, bytes); },
      stream);
}

Result StreamCreate(Stream* stream, unsigned int flags) {
  KVPAGE_ENTRY(StreamCreate, Context);
  if (flags > kStreamNonBlocking) return entry->Violation("cuStreamCreate: unknown flags");
  entry->last_id += 16;
  *stream = reinterpret_cast<Stream>(entry->last_id);
  FakeDriver::Impl::StreamState& state = entry->streams[*stream];
  state.device = entry->CurrentDevice();
  state.blocking = flags != kStreamNonBlocking;
  return Result::kSuccess;
}

Result StreamSynchronize(Stream stream) {
  KVPAGE_ENTRY(StreamSynchronize, Context);
  if (!entry->Exists(stream)) return entry->Violation("cuStreamSynchronize: no such stream", Result::kInvalidHandle);
  FakeDriver::Impl& fake = entry.fake();
  const FakeDriver::Impl::StreamState& state = fake.streams.at(stream);
  KVPAGE_CHECK_DEVICE("cuStreamSynchronize", state.device);
  const Result captured = fake.CheckCaptures("cuStreamSynchronize", Result::kStreamCaptureUnsupported,
                                             [&](const auto& other) { return &other == &state; });
  if (captured != Result::kSuccess) return captured;
  if (const Result result = fake.CheckNullStream("cuStreamSynchronize", stream); result != Result::kSuccess) {
    return result;
  }
  fake.changed.wait(*entry.lock(), [&] { return !fake.Exists(stream) || fake.streams.at(stream).idle(); });
  return Result::kSuccess;
}

Result CtxSynchronize() {
  KVPAGE_ENTRY(CtxSynchronize, Context);
  FakeDriver::Impl& fake = entry.fake();
  const int device = fake.CurrentDevice();
  // Regardless of the capturing thread and the mode: the context includes the captured stream.
  const Result captured = fake.CheckCaptures("cuCtxSynchronize", Result::kStreamCaptureUnsupported,
                                             [&](const auto& stream) { return stream.device == device; });
  if (captured != Result::kSuccess) return captured;
  fake.changed.wait(*entry.lock(), [&] { return fake.Idle(); });
  return Result::kSuccess;
}

Result StreamIsCapturing(Stream stream, CaptureStatus* status) {
  KVPAGE_ENTRY(StreamIsCapturing, Context);
  if (!entry->Exists(stream)) return entry->Violation("cuStreamIsCapturing: no such stream", Result::kInvalidHandle);
  KVPAGE_CHECK_DEVICE("cuStreamIsCapturing", entry->streams.at(stream).device);
  const auto& capture = entry->streams.at(stream).capture;
  *status = capture == nullptr     ? CaptureStatus::kNone
            : capture->invalidated ? CaptureStatus::kInvalidated
                                   : CaptureStatus::kActive;
  return Result::kSuccess;
}

Result StreamGetId(Stream stream, unsigned long long* id) {
  KVPAGE_ENTRY(StreamGetId, Context);
  if (!entry->Exists(stream)) return entry->Violation("cuStreamGetId: no such stream", Result::kInvalidHandle);
  KVPAGE_CHECK_DEVICE("cuStreamGetId", entry->streams.at(stream).device);
  *id = reinterpret_cast<std::uintptr_t>(stream);  // the fake driver never reuses addresses
  return Result::kSuccess;
}

Result StreamWaitEvent(Stream stream, Event event, unsigned int flags) {
  KVPAGE_ENTRY(StreamWaitEvent, Context);
  const auto it = entry->events.find(event);
  if (!entry->Exists(stream) || it == entry->events.end() || flags != 0) {
    return entry->Violation("cuStreamWaitEvent: no such stream or event, or flags", Result::kInvalidHandle);
  }
  KVPAGE_CHECK_DEVICE("cuStreamWaitEvent", entry->streams.at(stream).device);
  if (it->second->capture != entry->streams.at(stream).capture && it->second->capture != nullptr) {
    return entry->Violation("cuStreamWaitEvent: the event belongs to a capture of another stream",
                            Result::kStreamCaptureIsolation);
  }
  Work work;
  work.waits_for = it->second;
  work.record = it->second->recorded;
  return entry->Queue(stream, std::move(work), entry.lock());
}

Result ThreadExchangeStreamCaptureMode(CaptureMode* mode) {
  KVPAGE_ENTRY(ThreadExchangeStreamCaptureMode, Init);
  std::swap(*mode, FakeDriver::Impl::ThreadMode());
  return Result::kSuccess;
}

Result StreamDestroy(Stream stream) {
  KVPAGE_ENTRY(StreamDestroy, Context);
  if (stream == nullptr || !entry->Exists(stream)) {
    return entry->Violation("cuStreamDestroy: no such stream", Result::kInvalidHandle);
  }
  KVPAGE_CHECK_DEVICE("cuStreamDestroy", entry->streams.at(stream).device);
  if (entry->streams.at(stream).capture != nullptr) return entry->Violation("cuStreamDestroy during a capture");
  // Returns at once; queued work still runs.
  const auto it = entry->streams.find(stream);
  it->second.destroyed = true;
  if (it->second.idle()) entry->streams.erase(it);
  entry->changed.notify_all();
  return Result::kSuccess;
}

Result EventCreate(Event* event, unsigned int) {
  KVPAGE_ENTRY(EventCreate, Context);
  entry->last_id += 16;
  *event = reinterpret_cast<Event>(entry->last_id);
  entry->events[*event] = std::make_shared<FakeDriver::Impl::EventState>();
  entry->events[*event]->device = entry->CurrentDevice();
  return Result::kSuccess;
}

Result EventRecord(Event event, Stream stream) {
  KVPAGE_ENTRY(EventRecord, Context);
  const auto it = entry->events.find(event);
  if (it == entry->events.end()) return entry->Violation("cuEventRecord: no such event", Result::kInvalidHandle);
  if (!entry->Exists(stream)) {
    return entry->Violation("cuEventRecord on a stream that was destroyed", Result::kInvalidHandle);
  }
  const std::shared_ptr<FakeDriver::Impl::EventState> state = it->second;
  KVPAGE_CHECK_DEVICE("cuEventRecord", state->device);
  KVPAGE_CHECK_DEVICE("cuEventRecord", entry->streams.at(stream).device);
  state->capture = entry->streams.at(stream).capture;
  if (state->capture != nullptr) return Result::kSuccess;  // a node of the graph, not an event to wait for
  const std::uint64_t record = ++state->recorded;
  Work work;
  work.run = [state, record] { state->completed = std::max(state->completed, record); };
  return entry->Queue(stream, std::move(work), entry.lock());
}

Result EventQuery(Event event) {
  KVPAGE_ENTRY(EventQuery, Context);
  const auto it = entry->events.find(event);
  if (it == entry->events.end()) return entry->Violation("cuEventQuery: no such event", Result::kInvalidHandle);
  KVPAGE_CHECK_DEVICE("cuEventQuery", it->second->device);
  if (it->second->capture != nullptr) return CapturedEvent(&entry, "cuEventQuery", *it->second);
  return it->second->completed == it->second->recorded ? Result::kSuccess : Result::kNotReady;
}

Result EventSynchronize(Event event) {
  KVPAGE_ENTRY(EventSynchronize, Context);
  const auto it = entry->events.find(event);
  if (it == entry->events.end()) return entry->Violation("cuEventSynchronize: no such event", Result::kInvalidHandle);
  KVPAGE_CHECK_DEVICE("cuEventSynchronize", it->second->device);
  const std::shared_ptr<FakeDriver::Impl::EventState> state = it->second;
  if (state->capture != nullptr) return CapturedEvent(&entry, "cuEventSynchronize", *state);
  const std::uint64_t record = state->recorded;
  entry->changed.wait(*entry.lock(), [&] { return state->completed >= record; });
  return Result::kSuccess;
}

Result EventDestroy(Event event) {
  KVPAGE_ENTRY(EventDestroy, Context);
  if (entry->events.erase(event) == 0) {
    return entry->Violation("cuEventDestroy: no such event", Result::kInvalidHandle);
  }
  return Result::kSuccess;
}

}  // namespace cu::fake
}  // namespace kvpage
