// The fake driver's stream captures, and the rules that they impose on all calls.
//
// As in CUDA, nobody may wait for a captured stream or for a context that has one. "Potentially unsafe" calls are
// forbidden for the thread that captures and, during a capture in global mode, for every thread, unless the thread is
// in relaxed mode. Work on the null stream is forbidden while a blocking stream is captured. Violations invalidate the
// capture.
#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "testing/fake_impl.h"

namespace kvpage {

cu::Result FakeDriver::Impl::CheckCaptures(const std::string& call, cu::Result result,
                                           const std::function<bool(const StreamState&)>& broken) {
  bool any = false;
  for (auto& [stream, state] : streams) {
    if (state.capture == nullptr || !broken(state)) continue;
    state.capture->invalidated = true;
    any = true;
  }
  return any ? Violation(call + " during a capture that forbids it", result) : cu::Result::kSuccess;
}

cu::CaptureMode& FakeDriver::Impl::ThreadMode() {
  thread_local cu::CaptureMode mode = cu::CaptureMode::kGlobal;
  return mode;
}

cu::Result FakeDriver::Impl::CheckUnsafe(const std::string& call) {
  if (ThreadMode() == cu::CaptureMode::kRelaxed) return cu::Result::kSuccess;
  return CheckCaptures(call, cu::Result::kStreamCaptureUnsupported, [](const StreamState& stream) {
    const Capture& capture = *stream.capture;
    const bool mine = capture.owner == std::this_thread::get_id();
    return capture.mode == CaptureMode::kGlobal || (mine && capture.mode == CaptureMode::kThreadLocal);
  });
}

cu::Result FakeDriver::Impl::CheckNullStream(const std::string& call, cu::Stream stream) {
  if (stream != nullptr) return cu::Result::kSuccess;
  return CheckCaptures(call + " on the null stream", cu::Result::kStreamCaptureImplicit,
                       [](const StreamState& other) { return other.blocking; });
}

bool FakeDriver::Impl::Idle() const {
  return std::all_of(streams.begin(), streams.end(), [](const auto& stream) { return stream.second.idle(); });
}

void FakeDriver::BeginCapture(cu::Stream stream, CaptureMode mode) {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  auto capture = std::make_shared<Impl::Capture>();
  capture->owner = std::this_thread::get_id();
  capture->mode = mode;
  impl_->streams.at(stream).capture = std::move(capture);
}

std::shared_ptr<FakeDriver::Graph> FakeDriver::EndCapture(cu::Stream stream) {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  const std::shared_ptr<Impl::Capture> capture = std::move(impl_->streams.at(stream).capture);
  impl_->streams.at(stream).capture = nullptr;
  if (capture->invalidated) return nullptr;
  auto graph = std::make_shared<Graph>();
  graph->work = std::move(capture->work);
  return graph;
}

void FakeDriver::LaunchGraph(const std::shared_ptr<Graph>& graph, cu::Stream stream) {
  std::unique_lock<std::mutex> lock(impl_->mutex);
  for (const Impl::Work& work : graph->work) static_cast<void>(impl_->Queue(stream, work, &lock));
}

cu::Result FakeDriver::LoadModule() {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->CheckUnsafe("a module load");
}

}  // namespace kvpage
