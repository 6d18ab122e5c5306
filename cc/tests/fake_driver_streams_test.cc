// The fake driver's streams: at once, held back, waiting for each other; events that come late.
#include <atomic>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "testing/fake_driver.h"
#include "tests/check.h"
#include "vmm/cuda_context.h"

namespace kvpage {
namespace {

using cu::Result;

constexpr std::size_t kBytes = 4096;

// Two streams, an event, a piece of device and one of pinned memory.
struct World {
  World() {
    CHECK_OK(FakeDriver::Make({}, &fake));
    CHECK_OK(CudaContext::Make(fake->driver(), 0, &context));
    scope = std::make_unique<ContextScope>(*context);
    const Driver& driver = fake->driver();
    CHECK(driver.StreamCreate(&a, cu::kStreamNonBlocking) == Result::kSuccess);
    CHECK(driver.StreamCreate(&b, cu::kStreamNonBlocking) == Result::kSuccess);
    CHECK(driver.EventCreate(&event, cu::kEventDisableTiming) == Result::kSuccess);
    CHECK(driver.MemAlloc(&device, kBytes) == Result::kSuccess);
    void* host = nullptr;
    CHECK(driver.MemHostAlloc(&host, kBytes, cu::kHostAllocDeviceMap) == Result::kSuccess);
    pinned = static_cast<unsigned char*>(host);
    bytes = reinterpret_cast<unsigned char*>(device);
  }
  ~World() {
    const Driver& driver = fake->driver();
    CHECK(driver.MemFreeHost(pinned) == Result::kSuccess);
    CHECK(driver.MemFree(device) == Result::kSuccess);
    CHECK(driver.EventDestroy(event) == Result::kSuccess);
    CHECK(driver.StreamDestroy(b) == Result::kSuccess);
    CHECK(driver.StreamDestroy(a) == Result::kSuccess);
    scope.reset();
    context.reset();
    CHECK(fake->Report().empty()) << fake->Report().ToString();
  }
  std::unique_ptr<FakeDriver> fake;
  std::shared_ptr<CudaContext> context;
  std::unique_ptr<ContextScope> scope;
  cu::Stream a = nullptr, b = nullptr;
  cu::Event event = nullptr;
  cu::DevicePtr device = 0;
  unsigned char* pinned = nullptr;
  unsigned char* bytes = nullptr;
};

TEST(WorkRunsAtOnce) {
  World world;
  const Driver& driver = world.fake->driver();
  CHECK(driver.EventQuery(world.event) == Result::kSuccess) << "never recorded";
  CHECK(driver.MemsetD8Async(world.device, 3, kBytes, world.a) == Result::kSuccess);
  CHECK_EQ(static_cast<int>(world.bytes[kBytes - 1]), 3);
  CHECK(driver.MemcpyDtoHAsync(world.pinned, world.device, kBytes, nullptr) == Result::kSuccess);
  CHECK_EQ(static_cast<int>(world.pinned[9]), 3);
  world.pinned[9] = 4;
  CHECK(driver.MemcpyHtoDAsync(world.device, world.pinned, kBytes, world.b) == Result::kSuccess);
  CHECK(driver.MemcpyDtoDAsync(world.device, world.device + 9, 1, world.b) == Result::kSuccess);
  CHECK_EQ(static_cast<int>(world.bytes[0]), 4);
  CHECK(driver.EventRecord(world.event, world.a) == Result::kSuccess);
  CHECK(driver.EventQuery(world.event) == Result::kSuccess);
  cu::DevicePtr mapped = 0;
  CHECK(driver.MemHostGetDevicePointer(&mapped, world.pinned, 0) == Result::kSuccess);
  CHECK(driver.MemsetD8Async(mapped, 7, 8, world.a) == Result::kSuccess) << "pinned memory is the device's too";
  CHECK_EQ(static_cast<int>(world.pinned[7]), 7);
}

TEST(AHeldStreamKeepsItsOrder) {
  World world;
  const Driver& driver = world.fake->driver();
  world.fake->HoldStream(world.a);
  std::vector<int> order;
  world.fake->Enqueue(world.a, [&] { order.push_back(1); });
  CHECK(driver.MemsetD8Async(world.device, 1, kBytes, world.a) == Result::kSuccess);
  CHECK(driver.EventRecord(world.event, world.a) == Result::kSuccess);
  world.fake->Enqueue(world.a, [&] { order.push_back(world.bytes[0]); });
  CHECK(driver.MemsetD8Async(world.device, 2, kBytes, world.a) == Result::kSuccess);
  CHECK(driver.EventQuery(world.event) == Result::kNotReady);
  CHECK(order.empty());
  CHECK_EQ(world.fake->Report().queued, 5);
  world.fake->Enqueue(world.b, [&] { order.push_back(9); });  // others go on
  world.fake->ReleaseStream(world.a);
  CHECK((order == std::vector<int>{9, 1, 1}));
  CHECK_EQ(static_cast<int>(world.bytes[0]), 2);
  CHECK(driver.EventQuery(world.event) == Result::kSuccess);
}

TEST(CopiesReadPinnedMemoryWhenTheyRun) {
  World world;
  const Driver& driver = world.fake->driver();
  unsigned char pageable[2] = {1, 1};
  world.pinned[0] = 1;
  world.fake->HoldStream(world.a);
  CHECK(driver.MemcpyHtoDAsync(world.device, world.pinned, 1, world.a) == Result::kSuccess);
  CHECK(driver.MemcpyHtoDAsync(world.device + 1, pageable, 1, world.a) == Result::kSuccess);
  pageable[0] = world.pinned[0] = 2;
  world.fake->ReleaseStream(world.a);
  CHECK_EQ(static_cast<int>(world.bytes[0]), 2) << "pinned: changed before the copy ran";
  CHECK_EQ(static_cast<int>(world.bytes[1]), 1) << "pageable: read when it was queued";
}

TEST(AStreamWaitsForAnotherOnesEvent) {
  World world;
  const Driver& driver = world.fake->driver();
  std::vector<int> order;
  world.fake->HoldStream(world.a);
  world.fake->Enqueue(world.a, [&] { order.push_back(1); });
  CHECK(driver.EventRecord(world.event, world.a) == Result::kSuccess);
  CHECK(driver.StreamWaitEvent(world.b, world.event, 0) == Result::kSuccess);
  world.fake->Enqueue(world.b, [&] { order.push_back(2); });
  CHECK(order.empty());
  world.fake->ReleaseStream(world.a);
  CHECK((order == std::vector<int>{1, 2}));
}

TEST(WhoSynchronisesIsHeldBackToo) {
  World world;
  const Driver& driver = world.fake->driver();
  world.fake->HoldStream(world.a);
  CHECK(driver.EventRecord(world.event, world.a) == Result::kSuccess);
  std::atomic<bool> released{false};
  std::vector<std::thread> waiters;
  for (int i = 0; i < 2; ++i) {
    waiters.emplace_back([&, i] {
      const ContextScope scope(*world.context);
      const Result result = i == 0 ? driver.StreamSynchronize(world.a) : driver.EventSynchronize(world.event);
      CHECK(result == Result::kSuccess);
      CHECK(released.load());
    });
  }
  std::this_thread::yield();
  released = true;
  world.fake->ReleaseStream(world.a);
  for (std::thread& waiter : waiters) waiter.join();
}

TEST(MemoryThatGoesBeforeItsTurnIsAViolation) {
  std::unique_ptr<FakeDriver> fake;
  CHECK_OK(FakeDriver::Make({}, &fake));
  std::shared_ptr<CudaContext> context;
  CHECK_OK(CudaContext::Make(fake->driver(), 0, &context));
  const ContextScope scope(*context);
  const Driver& driver = fake->driver();
  cu::DevicePtr at = 0;
  CHECK(driver.MemAlloc(&at, kBytes) == Result::kSuccess);
  fake->HoldStream(nullptr);
  CHECK(driver.MemsetD8Async(at, 0, kBytes, nullptr) == Result::kSuccess);
  CHECK(driver.MemFree(at) == Result::kSuccess);
  CHECK_EQ(fake->Report().violations, 0);
  fake->ReleaseStream(nullptr);
  CHECK_EQ(fake->Report().violations, 1);
}

TEST(ADestroyedStreamRunsItsRest) {
  World world;
  const Driver& driver = world.fake->driver();
  cu::Stream stream = nullptr;
  CHECK(driver.StreamCreate(&stream, 0) == Result::kSuccess);
  world.fake->HoldStream(stream);
  bool ran = false;
  world.fake->Enqueue(stream, [&] { ran = true; });
  CHECK(driver.EventRecord(world.event, stream) == Result::kSuccess);
  CHECK(driver.StreamDestroy(stream) == Result::kSuccess);
  CHECK(driver.EventQuery(world.event) == Result::kNotReady);
  world.fake->ReleaseStream(stream);
  CHECK(ran);
  CHECK(driver.EventQuery(world.event) == Result::kSuccess);
}

TEST(KernelsMayRunForLong) {
  World world;
  const Driver& driver = world.fake->driver();
  std::atomic<bool> begun{false}, go_on{false};
  std::thread launcher([&] {
    world.fake->Enqueue(world.a, [&] {
      begun = true;
      while (!go_on.load()) std::this_thread::yield();
    });
  });
  while (!begun.load()) std::this_thread::yield();
  // Meanwhile other calls go on; what is queued behind it waits.
  CHECK(driver.EventRecord(world.event, world.a) == Result::kSuccess);
  CHECK(driver.EventQuery(world.event) == Result::kNotReady);
  CHECK(driver.MemsetD8Async(world.device, 1, kBytes, world.b) == Result::kSuccess);
  go_on = true;
  CHECK(driver.EventSynchronize(world.event) == Result::kSuccess);
  launcher.join();
}

}  // namespace
}  // namespace kvpage

int main(int argc, char** argv) { return kvpage::testing::RunAll(argc, argv); }
