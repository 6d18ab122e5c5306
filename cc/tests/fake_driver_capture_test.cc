// The fake driver's stream captures: work that is recorded in a graph, and calls that a capture forbids.
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "testing/fake_driver.h"
#include "tests/expect_ok.h"
#include "vmm/cuda_context.h"

namespace kvpage {
namespace {

using cu::Result;
using Mode = FakeDriver::CaptureMode;

constexpr std::size_t kBytes = 4096;

// One device with two streams, one of them blocking, and an event. The fake driver destroys them at the end.
struct World {
  World() {
    EXPECT_OK(FakeDriver::Make({}, &fake));
    EXPECT_OK(CudaContext::Make(fake->driver(), 0, &context));
    scope = std::make_unique<ContextScope>(*context);
    EXPECT_EQ(driver().StreamCreate(&stream, cu::kStreamNonBlocking), Result::kSuccess);
    EXPECT_EQ(driver().StreamCreate(&blocking, 0), Result::kSuccess);
    EXPECT_EQ(driver().StreamCreate(&other, cu::kStreamNonBlocking), Result::kSuccess);
    EXPECT_EQ(driver().EventCreate(&event, cu::kEventDisableTiming), Result::kSuccess);
    EXPECT_EQ(driver().MemAlloc(&memory, kBytes), Result::kSuccess);
  }
  const Driver& driver() const { return fake->driver(); }
  std::int64_t violations() const { return fake->Report().violations; }
  // Makes the call in a thread that does not own the capture.
  Result Elsewhere(const std::function<Result()>& call) const {
    Result result = Result::kUnknown;
    std::thread thread([&] {
      const ContextScope current(*context);
      result = call();
    });
    thread.join();
    return result;
  }

  std::unique_ptr<FakeDriver> fake;
  std::shared_ptr<CudaContext> context;
  std::unique_ptr<ContextScope> scope;
  cu::Stream stream = nullptr, blocking = nullptr, other = nullptr;
  cu::Event event = nullptr;
  cu::DevicePtr memory = 0;
};

TEST(FakeDriverCaptureTest, CapturedWorkRunsWhenItsGraphIsLaunched) {
  World world;
  int ran = 0;
  world.fake->BeginCapture(world.stream, Mode::kThreadLocal);
  auto status = cu::CaptureStatus::kNone;
  EXPECT_EQ(world.driver().StreamIsCapturing(world.stream, &status), Result::kSuccess);
  EXPECT_EQ(status, cu::CaptureStatus::kActive);
  world.fake->Enqueue(world.stream, [&] { ++ran; });
  EXPECT_EQ(world.driver().MemsetD8Async(world.memory, 7, kBytes, world.stream), Result::kSuccess);
  const auto graph = world.fake->EndCapture(world.stream);
  ASSERT_NE(graph, nullptr);
  EXPECT_EQ(world.driver().StreamIsCapturing(world.stream, &status), Result::kSuccess);
  EXPECT_EQ(status, cu::CaptureStatus::kNone);
  EXPECT_EQ(ran, 0);
  for (int replay = 1; replay <= 2; ++replay) {
    world.fake->LaunchGraph(graph, world.other);
    EXPECT_EQ(ran, replay);
  }
  EXPECT_EQ(*reinterpret_cast<const unsigned char*>(world.memory), 7);
  EXPECT_EQ(world.violations(), 0);
}

TEST(FakeDriverCaptureTest, NobodySynchronisesAContextWithACapture) {
  for (const Mode mode : {Mode::kGlobal, Mode::kThreadLocal, Mode::kRelaxed}) {
    World world;
    world.fake->BeginCapture(world.stream, mode);
    EXPECT_EQ(world.Elsewhere(world.driver().CtxSynchronize), Result::kStreamCaptureUnsupported);
    EXPECT_EQ(world.fake->EndCapture(world.stream), nullptr) << "the capture is invalid from then on";
    EXPECT_EQ(world.fake->Report().first_violation, "cuCtxSynchronize during a capture that forbids it");
    EXPECT_EQ(world.driver().CtxSynchronize(), Result::kSuccess);
  }
}

TEST(FakeDriverCaptureTest, UnsafeCallsAreTheCapturingThreadsOrInGlobalModeEverybodys) {
  struct Case {
    Mode mode;
    bool here, elsewhere;  // whether it is forbidden in this and in other threads
  };
  for (const Case& c :
       {Case{Mode::kGlobal, true, true}, Case{Mode::kThreadLocal, true, false}, Case{Mode::kRelaxed, false, false}}) {
    World world;
    const Driver& driver = world.driver();
    void* host = nullptr;
    cu::DevicePtr more = 0;
    const std::function<Result()> calls[] = {
        [&] { return driver.MemAlloc(&more, kBytes); },
        [&] { return driver.MemHostAlloc(&host, kBytes, cu::kHostAllocPortable); },
        [&] { return driver.EventQuery(world.event); },
        [&] { return driver.EventSynchronize(world.event); },
        [&] { return world.fake->LoadModule(); },
    };
    for (const auto& call : calls) {
      for (const bool here : {true, false}) {
        world.fake->BeginCapture(world.stream, c.mode);
        const bool forbidden = here ? c.here : c.elsewhere;
        EXPECT_EQ(here ? call() : world.Elsewhere(call),
                  forbidden ? Result::kStreamCaptureUnsupported : Result::kSuccess);
        EXPECT_EQ(world.fake->EndCapture(world.stream) == nullptr, forbidden);
      }
    }
    // Calls unrelated to the capture are allowed in all threads.
    world.fake->BeginCapture(world.stream, c.mode);
    EXPECT_EQ(driver.MemsetD8Async(world.memory, 1, kBytes, world.other), Result::kSuccess);
    EXPECT_EQ(driver.StreamSynchronize(world.other), Result::kSuccess);
    EXPECT_EQ(driver.EventRecord(world.event, world.other), Result::kSuccess);
    EXPECT_NE(world.fake->EndCapture(world.stream), nullptr);
  }
}

TEST(FakeDriverCaptureTest, NobodyWaitsForWhatIsCaptured) {
  World world;
  const Driver& driver = world.driver();
  world.fake->BeginCapture(world.stream, Mode::kRelaxed);
  EXPECT_EQ(driver.StreamSynchronize(world.stream), Result::kStreamCaptureUnsupported);
  EXPECT_EQ(world.fake->EndCapture(world.stream), nullptr);
  for (const auto call : {driver.EventQuery, driver.EventSynchronize}) {
    world.fake->BeginCapture(world.stream, Mode::kRelaxed);
    EXPECT_EQ(driver.EventRecord(world.event, world.stream), Result::kSuccess);
    EXPECT_EQ(call(world.event), Result::kCapturedEvent);
    EXPECT_EQ(world.fake->EndCapture(world.stream), nullptr);
  }
  world.fake->BeginCapture(world.stream, Mode::kRelaxed);
  EXPECT_EQ(driver.EventRecord(world.event, world.stream), Result::kSuccess);
  EXPECT_EQ(driver.StreamWaitEvent(world.other, world.event, 0), Result::kStreamCaptureIsolation);
  EXPECT_NE(world.fake->EndCapture(world.stream), nullptr);
  EXPECT_EQ(driver.EventRecord(world.event, world.other), Result::kSuccess);
  EXPECT_EQ(driver.EventQuery(world.event), Result::kSuccess) << "recorded anew, outside";
  EXPECT_EQ(world.violations(), 4);
}

TEST(FakeDriverCaptureTest, TheNullStreamWaitsForBlockingStreams) {
  World world;
  const Driver& driver = world.driver();
  const auto fill = [&] { return driver.MemsetD8Async(world.memory, 1, kBytes, nullptr); };
  world.fake->BeginCapture(world.stream, Mode::kThreadLocal);
  EXPECT_EQ(fill(), Result::kSuccess);
  EXPECT_NE(world.fake->EndCapture(world.stream), nullptr);
  world.fake->BeginCapture(world.blocking, Mode::kThreadLocal);
  EXPECT_EQ(world.Elsewhere(fill), Result::kStreamCaptureImplicit);
  EXPECT_EQ(world.fake->EndCapture(world.blocking), nullptr);
}

TEST(FakeDriverCaptureTest, EventsOnDestroyedStreamsAreViolations) {
  World world;
  EXPECT_EQ(world.driver().StreamDestroy(world.stream), Result::kSuccess);
  EXPECT_EQ(world.driver().EventRecord(world.event, world.stream), Result::kInvalidHandle);
  EXPECT_EQ(world.fake->Report().first_violation, "cuEventRecord on a stream that was destroyed");
}

TEST(FakeDriverCaptureTest, MappingMayWaitForKernels) {
  FakeDriver::Options options;
  options.mapping_waits = true;
  std::unique_ptr<FakeDriver> fake;
  EXPECT_OK(FakeDriver::Make(options, &fake));
  const Driver& driver = fake->driver();
  std::shared_ptr<CudaContext> context;
  EXPECT_OK(CudaContext::Make(driver, 0, &context));
  const ContextScope scope(*context);
  const std::size_t grain = static_cast<std::size_t>(options.granularity);
  cu::AllocationProp prop;
  cu::DevicePtr at = 0;
  cu::MemHandle handle = 0;
  EXPECT_EQ(driver.MemAddressReserve(&at, grain, grain, 0, 0), Result::kSuccess);
  EXPECT_EQ(driver.MemCreate(&handle, grain, &prop, 0), Result::kSuccess);
  bool ran = false;
  const std::function<Result()> calls[] = {[&] { return driver.MemMap(at, grain, 0, handle, 0); },
                                           [&] { return driver.MemUnmap(at, grain); }};
  for (const auto& call : calls) {
    ran = false;
    fake->HoldStream(nullptr);
    fake->Enqueue(nullptr, [&] { ran = true; });
    std::thread mapper([&] {
      const ContextScope current(*context);
      EXPECT_EQ(call(), Result::kSuccess);
      EXPECT_TRUE(ran);
    });
    std::this_thread::yield();
    fake->ReleaseStream(nullptr);
    mapper.join();
  }
  EXPECT_EQ(driver.MemRelease(handle), Result::kSuccess);
  EXPECT_EQ(driver.MemAddressFree(at, grain), Result::kSuccess);
}

}  // namespace
}  // namespace kvpage
