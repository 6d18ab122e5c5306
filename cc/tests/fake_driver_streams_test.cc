// The fake driver's streams: immediate, held, waiting for each other; events that complete late.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "testing/fake_driver.h"
#include "tests/expect_ok.h"
#include "vmm/cuda_context.h"

namespace kvpage {
namespace {

using cu::Result;

constexpr std::size_t kBytes = 4096;

// Two streams, an event, and some device and pinned memory.
struct World {
  World() {
    EXPECT_OK(FakeDriver::Make({}, &fake));
    EXPECT_OK(CudaContext::Make(fake->driver(), 0, &context));
    scope = std::make_unique<ContextScope>(*context);
    const Driver& driver = fake->driver();
    EXPECT_EQ(driver.StreamCreate(&a, cu::kStreamNonBlocking), Result::kSuccess);
    EXPECT_EQ(driver.StreamCreate(&b, cu::kStreamNonBlocking), Result::kSuccess);
    EXPECT_EQ(driver.EventCreate(&event, cu::kEventDisableTiming), Result::kSuccess);
    EXPECT_EQ(driver.MemAlloc(&device, kBytes), Result::kSuccess);
    void* host = nullptr;
    EXPECT_EQ(driver.MemHostAlloc(&host, kBytes, cu::kHostAllocDeviceMap), Result::kSuccess);
    pinned = static_cast<unsigned char*>(host);
    bytes = reinterpret_cast<unsigned char*>(device);
  }
  ~World() {
    const Driver& driver = fake->driver();
    EXPECT_EQ(driver.MemFreeHost(pinned), Result::kSuccess);
    EXPECT_EQ(driver.MemFree(device), Result::kSuccess);
    EXPECT_EQ(driver.EventDestroy(event), Result::kSuccess);
    EXPECT_EQ(driver.StreamDestroy(b), Result::kSuccess);
    EXPECT_EQ(driver.StreamDestroy(a), Result::kSuccess);
    scope.reset();
    context.reset();
    EXPECT_TRUE(fake->Report().empty()) << fake->Report().ToString();
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

TEST(FakeDriverStreamsTest, WorkRunsAtOnce) {
  World world;
  const Driver& driver = world.fake->driver();
  EXPECT_EQ(driver.EventQuery(world.event), Result::kSuccess) << "never recorded";
  EXPECT_EQ(driver.MemsetD8Async(world.device, 3, kBytes, world.a), Result::kSuccess);
  EXPECT_EQ(static_cast<int>(world.bytes[kBytes - 1]), 3);
  EXPECT_EQ(driver.MemcpyDtoHAsync(world.pinned, world.device, kBytes, nullptr), Result::kSuccess);
  EXPECT_EQ(static_cast<int>(world.pinned[9]), 3);
  world.pinned[9] = 4;
  EXPECT_EQ(driver.MemcpyHtoDAsync(world.device, world.pinned, kBytes, world.b), Result::kSuccess);
  EXPECT_EQ(driver.MemcpyDtoDAsync(world.device, world.device + 9, 1, world.b), Result::kSuccess);
  EXPECT_EQ(static_cast<int>(world.bytes[0]), 4);
  EXPECT_EQ(driver.EventRecord(world.event, world.a), Result::kSuccess);
  EXPECT_EQ(driver.EventQuery(world.event), Result::kSuccess);
  cu::DevicePtr mapped = 0;
  EXPECT_EQ(driver.MemHostGetDevicePointer(&mapped, world.pinned, 0), Result::kSuccess);
  EXPECT_EQ(driver.MemsetD8Async(mapped, 7, 8, world.a), Result::kSuccess) << "pinned memory is the device's too";
  EXPECT_EQ(static_cast<int>(world.pinned[7]), 7);
}

TEST(FakeDriverStreamsTest, AHeldStreamKeepsItsOrder) {
  World world;
  const Driver& driver = world.fake->driver();
  world.fake->HoldStream(world.a);
  std::vector<int> order;
  world.fake->Enqueue(world.a, [&] { order.push_back(1); });
  EXPECT_EQ(driver.MemsetD8Async(world.device, 1, kBytes, world.a), Result::kSuccess);
  EXPECT_EQ(driver.EventRecord(world.event, world.a), Result::kSuccess);
  world.fake->Enqueue(world.a, [&] { order.push_back(world.bytes[0]); });
  EXPECT_EQ(driver.MemsetD8Async(world.device, 2, kBytes, world.a), Result::kSuccess);
  EXPECT_EQ(driver.EventQuery(world.event), Result::kNotReady);
  EXPECT_TRUE(order.empty());
  EXPECT_EQ(world.fake->Report().queued, 5);
  world.fake->Enqueue(world.b, [&] { order.push_back(9); });  // other streams continue
  world.fake->ReleaseStream(world.a);
  EXPECT_EQ(order, (std::vector<int>{9, 1, 1}));
  EXPECT_EQ(static_cast<int>(world.bytes[0]), 2);
  EXPECT_EQ(driver.EventQuery(world.event), Result::kSuccess);
}

TEST(FakeDriverStreamsTest, CopiesReadPinnedMemoryWhenTheyRun) {
  World world;
  const Driver& driver = world.fake->driver();
  unsigned char pageable[2] = {1, 1};
  world.pinned[0] = 1;
  world.fake->HoldStream(world.a);
  EXPECT_EQ(driver.MemcpyHtoDAsync(world.device, world.pinned, 1, world.a), Result::kSuccess);
  EXPECT_EQ(driver.MemcpyHtoDAsync(world.device + 1, pageable, 1, world.a), Result::kSuccess);
  pageable[0] = world.pinned[0] = 2;
  world.fake->ReleaseStream(world.a);
  EXPECT_EQ(static_cast<int>(world.bytes[0]), 2) << "pinned: changed before the copy ran";
  EXPECT_EQ(static_cast<int>(world.bytes[1]), 1) << "pageable: read when it was queued";
}

TEST(FakeDriverStreamsTest, AStreamWaitsForAnotherOnesEvent) {
  World world;
  const Driver& driver = world.fake->driver();
  std::vector<int> order;
  world.fake->HoldStream(world.a);
  world.fake->Enqueue(world.a, [&] { order.push_back(1); });
  EXPECT_EQ(driver.EventRecord(world.event, world.a), Result::kSuccess);
  EXPECT_EQ(driver.StreamWaitEvent(world.b, world.event, 0), Result::kSuccess);
  world.fake->Enqueue(world.b, [&] { order.push_back(2); });
  EXPECT_TRUE(order.empty());
  world.fake->ReleaseStream(world.a);
  EXPECT_EQ(order, (std::vector<int>{1, 2}));
}

TEST(FakeDriverStreamsTest, WhoSynchronisesIsHeldBackToo) {
  World world;
  const Driver& driver = world.fake->driver();
  world.fake->HoldStream(world.a);
  EXPECT_EQ(driver.EventRecord(world.event, world.a), Result::kSuccess);
  std::atomic<bool> released{false};
  std::vector<std::thread> waiters;
  for (int i = 0; i < 2; ++i) {
    waiters.emplace_back([&, i] {
      const ContextScope scope(*world.context);
      const Result result = i == 0 ? driver.StreamSynchronize(world.a) : driver.EventSynchronize(world.event);
      EXPECT_EQ(result, Result::kSuccess);
      EXPECT_TRUE(released.load());
    });
  }
  std::this_thread::yield();
  released = true;
  world.fake->ReleaseStream(world.a);
  for (std::thread& waiter : waiters) waiter.join();
}

TEST(FakeDriverStreamsTest, MemoryThatGoesBeforeItsTurnIsAViolation) {
  std::unique_ptr<FakeDriver> fake;
  EXPECT_OK(FakeDriver::Make({}, &fake));
  std::shared_ptr<CudaContext> context;
  EXPECT_OK(CudaContext::Make(fake->driver(), 0, &context));
  const ContextScope scope(*context);
  const Driver& driver = fake->driver();
  cu::DevicePtr at = 0;
  EXPECT_EQ(driver.MemAlloc(&at, kBytes), Result::kSuccess);
  fake->HoldStream(nullptr);
  EXPECT_EQ(driver.MemsetD8Async(at, 0, kBytes, nullptr), Result::kSuccess);
  EXPECT_EQ(driver.MemFree(at), Result::kSuccess);
  EXPECT_EQ(fake->Report().violations, 0);
  fake->ReleaseStream(nullptr);
  EXPECT_EQ(fake->Report().violations, 1);
}

TEST(FakeDriverStreamsTest, ADestroyedStreamRunsItsRest) {
  World world;
  const Driver& driver = world.fake->driver();
  cu::Stream stream = nullptr;
  EXPECT_EQ(driver.StreamCreate(&stream, 0), Result::kSuccess);
  world.fake->HoldStream(stream);
  bool ran = false;
  world.fake->Enqueue(stream, [&] { ran = true; });
  EXPECT_EQ(driver.EventRecord(world.event, stream), Result::kSuccess);
  EXPECT_EQ(driver.StreamDestroy(stream), Result::kSuccess);
  EXPECT_EQ(driver.EventQuery(world.event), Result::kNotReady);
  world.fake->ReleaseStream(stream);
  EXPECT_TRUE(ran);
  EXPECT_EQ(driver.EventQuery(world.event), Result::kSuccess);
}

TEST(FakeDriverStreamsTest, KernelsMayRunForLong) {
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
  // Other calls continue meanwhile; work queued after it waits.
  EXPECT_EQ(driver.EventRecord(world.event, world.a), Result::kSuccess);
  EXPECT_EQ(driver.EventQuery(world.event), Result::kNotReady);
  EXPECT_EQ(driver.MemsetD8Async(world.device, 1, kBytes, world.b), Result::kSuccess);
  go_on = true;
  EXPECT_EQ(driver.EventSynchronize(world.event), Result::kSuccess);
  launcher.join();
}

}  // namespace
}  // namespace kvpage
