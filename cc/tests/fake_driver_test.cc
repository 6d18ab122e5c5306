// The fake driver itself: the rules of the real one, faults on demand, late streams and events, accounts.
#include "testing/fake_driver.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <thread>

#include "tests/expect_ok.h"
#include "vmm/cuda_context.h"

namespace kvpage {
namespace {

using cu::Call;
using cu::Result;

constexpr std::size_t kGrain = 65536;

// A driver with one device, whose context is current on this thread.
struct World {
  explicit World(FakeDriver::Options options = DefaultOptions()) {
    EXPECT_OK(FakeDriver::Make(options, &fake));
    EXPECT_OK(CudaContext::Make(fake->driver(), 0, &context));
    scope = std::make_unique<ContextScope>(*context);
    EXPECT_OK(scope->status());
  }
  static FakeDriver::Options DefaultOptions() {
    FakeDriver::Options options;
    options.granularity = kGrain;
    options.device_bytes = 64 * kGrain;
    return options;
  }
  const Driver& driver() const { return fake->driver(); }
  std::int64_t violations() const { return fake->Report().violations; }

  Result Create(cu::MemHandle* handle, std::size_t bytes = kGrain) const {
    const cu::AllocationProp prop;
    return driver().MemCreate(handle, bytes, &prop, 0);
  }
  Result Map(cu::DevicePtr at, cu::MemHandle handle, std::size_t bytes = kGrain) const {
    return driver().MemMap(at, bytes, 0, handle, 0);
  }
  Result Allow(cu::DevicePtr at, std::size_t bytes = kGrain, int device = 0) const {
    cu::AccessDesc access;
    access.location.id = device;
    return driver().MemSetAccess(at, bytes, &access, 1);
  }
  cu::DevicePtr Reserve(std::size_t bytes) const {
    cu::DevicePtr at = 0;
    EXPECT_EQ(driver().MemAddressReserve(&at, bytes, 0, 0, 0), Result::kSuccess);
    return at;
  }
  // Asserts that nothing but the context is alive, and that this many rules were broken.
  void Finish(std::int64_t violations = 0) {
    scope.reset();
    context.reset();
    FakeDriver::State state = fake->Report();
    EXPECT_EQ(state.violations, violations) << state.first_violation;
    state.violations = 0;
    EXPECT_TRUE(state.empty()) << state.ToString();
  }

  std::unique_ptr<FakeDriver> fake;
  std::shared_ptr<CudaContext> context;
  std::unique_ptr<ContextScope> scope;
};

// Asks the kernel instead of risking a fault.
bool Readable(cu::DevicePtr at) {
  int ends[2];
  if (pipe(ends) != 0) return false;
  const bool readable = write(ends[1], reinterpret_cast<const void*>(at), 1) == 1;
  close(ends[0]);
  close(ends[1]);
  return readable;
}

TEST(FakeDriverTest, MappedMemoryIsThereOnceAccessIsSet) {
  World world;
  const Driver& driver = world.driver();
  const cu::DevicePtr at = world.Reserve(4 * kGrain);
  cu::MemHandle handle = 0;
  EXPECT_EQ(world.Create(&handle), Result::kSuccess);
  EXPECT_EQ(world.fake->Report().used_bytes, static_cast<std::int64_t>(kGrain));
  EXPECT_FALSE(Readable(at));
  EXPECT_EQ(world.Map(at, handle), Result::kSuccess);
  EXPECT_FALSE(Readable(at)) << "no access has been set";
  EXPECT_EQ(world.Allow(at), Result::kSuccess);
  EXPECT_TRUE(Readable(at));
  char* const bytes = reinterpret_cast<char*>(at);
  EXPECT_EQ(static_cast<int>(static_cast<unsigned char>(bytes[kGrain - 1])), 0xFF) << "new memory is not zeros";
  std::memset(bytes, 5, kGrain);
  // The same handle at a second address: the same memory.
  EXPECT_EQ(world.Map(at + 2 * kGrain, handle), Result::kSuccess);
  EXPECT_EQ(world.Allow(at + 2 * kGrain), Result::kSuccess);
  EXPECT_EQ(static_cast<int>(bytes[2 * kGrain + 77]), 5);
  EXPECT_EQ(driver.MemUnmap(at, kGrain), Result::kSuccess);
  EXPECT_FALSE(Readable(at));
  // When mapped again it starts without access, and has kept its contents.
  EXPECT_EQ(world.Map(at + kGrain, handle), Result::kSuccess);
  EXPECT_FALSE(Readable(at + kGrain));
  EXPECT_EQ(world.Allow(at + kGrain, 2 * kGrain), Result::kSuccess) << "two mappings by one call";
  EXPECT_EQ(static_cast<int>(bytes[kGrain + 1]), 5);
  EXPECT_EQ(driver.MemUnmap(at + kGrain, kGrain), Result::kSuccess);
  EXPECT_EQ(driver.MemUnmap(at + 2 * kGrain, kGrain), Result::kSuccess);
  EXPECT_EQ(driver.MemRelease(handle), Result::kSuccess);
  EXPECT_EQ(driver.MemAddressFree(at, 4 * kGrain), Result::kSuccess);
  world.Finish();
}

TEST(FakeDriverTest, BrokenRulesAreRefusedAndCounted) {
  World world;
  const Driver& driver = world.driver();
  const cu::DevicePtr at = world.Reserve(4 * kGrain);
  cu::MemHandle handle = 0, big = 0, none = 0;
  EXPECT_EQ(world.Create(&handle), Result::kSuccess);
  EXPECT_EQ(world.Create(&big, 2 * kGrain), Result::kSuccess);
  EXPECT_EQ(world.Map(at + kGrain, handle), Result::kSuccess);
  const FakeDriver::State before = world.fake->Report();
  std::int64_t broken = 0;
  const auto refused = [&](const char* what, Result result, Result wanted = Result::kInvalidValue) {
    EXPECT_EQ(result, wanted) << what << " answered " << static_cast<int>(result);
    EXPECT_EQ(world.violations(), ++broken) << what;
  };
  cu::DevicePtr other = 0;
  refused("an odd reservation", driver.MemAddressReserve(&other, kGrain / 2, 0, 0, 0));
  refused("an odd alignment", driver.MemAddressReserve(&other, kGrain, 3, 0, 0));
  refused("an odd handle", world.Create(&none, kGrain + 4096));
  refused("an odd address", world.Map(at + 4096, handle));
  refused("a part of a handle", world.Map(at + 2 * kGrain, big));
  refused("an offset", driver.MemMap(at, kGrain, kGrain, big, 0));
  refused("over a mapping", world.Map(at + kGrain, handle));
  refused("half over a mapping", world.Map(at, big, 2 * kGrain));
  refused("past the reservation", world.Map(at + 3 * kGrain, big, 2 * kGrain));
  refused("nowhere", world.Map(at + 64 * kGrain, handle));
  refused("no handle", world.Map(at, handle + 1000));
  refused("access to a hole", world.Allow(at));
  refused("access beyond", world.Allow(at + kGrain, 2 * kGrain));
  refused("access to a part", world.Allow(at + kGrain, kGrain / 2));
  refused("another device", world.Allow(at + kGrain, kGrain, 1), Result::kInvalidDevice);
  refused("a fill without access", driver.MemsetD8Async(at + kGrain, 0, 1, nullptr));
  refused("unmapping a hole", driver.MemUnmap(at, kGrain));
  refused("unmapping more than was mapped", driver.MemUnmap(at + kGrain, 2 * kGrain));
  refused("a reservation in use", driver.MemAddressFree(at, 4 * kGrain));
  refused("a part of a reservation", driver.MemAddressFree(at, kGrain));
  refused("freeing what is not there", driver.MemFree(at));
  refused("no such handle", driver.MemRelease(handle + 1000));
  EXPECT_EQ(world.fake->Report().mappings, before.mappings);
  EXPECT_EQ(world.fake->Report().handles, before.handles);
  EXPECT_EQ(world.fake->Report().used_bytes, before.used_bytes);
  EXPECT_EQ(driver.MemUnmap(at + kGrain, kGrain), Result::kSuccess);
  EXPECT_EQ(driver.MemRelease(handle), Result::kSuccess);
  refused("a second release", driver.MemRelease(handle));
  refused("mapping what was released", world.Map(at, handle));
  EXPECT_EQ(driver.MemRelease(big), Result::kSuccess);
  EXPECT_EQ(driver.MemAddressFree(at, 4 * kGrain), Result::kSuccess);
  world.Finish(broken);
}

TEST(FakeDriverTest, AReleasedHandleLivesUntilItIsUnmapped) {
  World world;
  const cu::DevicePtr at = world.Reserve(kGrain);
  cu::MemHandle handle = 0;
  EXPECT_EQ(world.Create(&handle), Result::kSuccess);
  EXPECT_EQ(world.Map(at, handle), Result::kSuccess);
  EXPECT_EQ(world.Allow(at), Result::kSuccess);
  EXPECT_EQ(world.driver().MemRelease(handle), Result::kSuccess);
  EXPECT_TRUE(Readable(at));
  EXPECT_EQ(world.fake->Report().used_bytes, static_cast<std::int64_t>(kGrain));
  EXPECT_EQ(world.fake->Report().released_while_mapped, 1);
  EXPECT_EQ(world.driver().MemUnmap(at, kGrain), Result::kSuccess);
  EXPECT_EQ(world.fake->Report().used_bytes, 0);
  EXPECT_FALSE(world.fake->Report().empty()) << "it is told all the same";
  EXPECT_EQ(world.driver().MemAddressFree(at, kGrain), Result::kSuccess);
}

TEST(FakeDriverTest, MemoryRunsOut) {
  World world;
  const Driver& driver = world.driver();
  cu::MemHandle handle = 0, more = 0;
  cu::DevicePtr table = 0;
  EXPECT_EQ(world.Create(&handle, 60 * kGrain), Result::kSuccess);
  EXPECT_EQ(driver.MemAlloc(&table, 3 * kGrain), Result::kSuccess);
  EXPECT_EQ(world.Create(&more, 2 * kGrain), Result::kOutOfMemory);
  cu::DevicePtr second = 0;
  EXPECT_EQ(driver.MemAlloc(&second, 2 * kGrain), Result::kOutOfMemory);
  std::size_t free = 0, total = 0;
  EXPECT_EQ(driver.MemGetInfo(&free, &total), Result::kSuccess);
  EXPECT_EQ(free, kGrain);
  EXPECT_EQ(total, 64 * kGrain);
  EXPECT_EQ(driver.MemFree(table), Result::kSuccess);
  EXPECT_EQ(world.Create(&more, 2 * kGrain), Result::kSuccess);
  EXPECT_EQ(driver.MemRelease(more), Result::kSuccess);
  EXPECT_EQ(driver.MemRelease(handle), Result::kSuccess);
  world.Finish();
}

TEST(FakeDriverTest, ACurrentContextIsWanted) {
  World world;
  const Driver& driver = world.driver();
  world.scope.reset();
  cu::MemHandle handle = 0;
  EXPECT_EQ(world.Create(&handle), Result::kInvalidContext);
  cu::Stream stream = nullptr;
  EXPECT_EQ(driver.StreamCreate(&stream, 0), Result::kInvalidContext);
  cu::Context popped = nullptr;
  EXPECT_EQ(driver.CtxPopCurrent(&popped), Result::kInvalidContext);
  EXPECT_EQ(world.violations(), 3);
  EXPECT_EQ(driver.CtxPushCurrent(world.context->get()), Result::kSuccess);
  std::thread([&] { EXPECT_EQ(driver.StreamCreate(&stream, 0), Result::kInvalidContext); }).join();
  EXPECT_EQ(driver.CtxPopCurrent(&popped), Result::kSuccess);
  EXPECT_EQ(popped, world.context->get());
  const cu::Context old = world.context->get();
  world.context.reset();
  EXPECT_EQ(driver.CtxPushCurrent(old), Result::kInvalidContext) << "nobody retains it";
  world.Finish(5);
}

// Every call about a device's memory, stream or event needs that device's context.
TEST(FakeDriverTest, TheContextMustBeTheDevices) {
  FakeDriver::Options options = World::DefaultOptions();
  options.devices = 2;
  World world(options);
  const Driver& driver = world.driver();
  cu::MemHandle handle = 0;
  EXPECT_EQ(world.Create(&handle), Result::kSuccess);
  const cu::DevicePtr at = world.Reserve(kGrain);
  EXPECT_EQ(world.Map(at, handle), Result::kSuccess);
  EXPECT_EQ(world.Allow(at), Result::kSuccess);
  cu::DevicePtr allocated = 0;
  EXPECT_EQ(driver.MemAlloc(&allocated, 4096), Result::kSuccess);
  cu::Stream stream = nullptr, other_stream = nullptr;
  EXPECT_EQ(driver.StreamCreate(&stream, cu::kStreamNonBlocking), Result::kSuccess);
  cu::Event event = nullptr;
  EXPECT_EQ(driver.EventCreate(&event, 0), Result::kSuccess);
  EXPECT_EQ(driver.EventRecord(event, stream), Result::kSuccess);
  char host[4] = {};
  auto capturing = cu::CaptureStatus::kNone;
  unsigned long long id = 0;
  std::shared_ptr<CudaContext> second;
  EXPECT_OK(CudaContext::Make(driver, 1, &second));
  {
    const ContextScope other(*second);
    EXPECT_OK(other.status());
    EXPECT_EQ(driver.StreamCreate(&other_stream, cu::kStreamNonBlocking), Result::kSuccess);
    cu::MemHandle made = 0;
    const Result wrong[] = {world.Create(&made),
                            world.Allow(at),
                            driver.MemUnmap(at, kGrain),
                            driver.MemRelease(handle),
                            driver.MemFree(allocated),
                            driver.MemcpyHtoDAsync(at, host, sizeof(host), other_stream),
                            driver.MemcpyDtoHAsync(host, allocated, sizeof(host), other_stream),
                            driver.MemcpyDtoDAsync(at, allocated, sizeof(host), other_stream),
                            driver.MemsetD8Async(at, 0, 1, stream),
                            driver.StreamSynchronize(stream),
                            driver.StreamIsCapturing(stream, &capturing),
                            driver.StreamGetId(stream, &id),
                            driver.StreamWaitEvent(stream, event, 0),
                            driver.StreamDestroy(stream),
                            driver.EventRecord(event, other_stream),
                            driver.EventQuery(event),
                            driver.EventSynchronize(event)};
    std::int64_t seen = 0;
    for (const Result result : wrong) EXPECT_EQ(result, Result::kInvalidContext) << "call " << seen++;
    EXPECT_EQ(world.violations(), static_cast<std::int64_t>(std::size(wrong)));
    EXPECT_EQ(driver.StreamDestroy(other_stream), Result::kSuccess);
  }
  second.reset();
  EXPECT_EQ(driver.EventDestroy(event), Result::kSuccess);
  EXPECT_EQ(driver.StreamDestroy(stream), Result::kSuccess);
  EXPECT_EQ(driver.MemFree(allocated), Result::kSuccess);
  EXPECT_EQ(driver.MemUnmap(at, kGrain), Result::kSuccess);
  EXPECT_EQ(driver.MemRelease(handle), Result::kSuccess);
  EXPECT_EQ(driver.MemAddressFree(at, kGrain), Result::kSuccess);
  world.Finish(17);
}

TEST(FakeDriverTest, CallsAreCountedAndFailOnDemand) {
  World world;
  const Driver& driver = world.driver();
  world.fake->FailAt(Call::kMemCreate, 3, Result::kOutOfMemory, 2);
  cu::MemHandle handles[5] = {};
  Result results[5];
  for (int i = 0; i < 5; ++i) results[i] = world.Create(&handles[i]);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(results[i], (i == 2 || i == 3 ? Result::kOutOfMemory : Result::kSuccess)) << i;
  EXPECT_EQ(world.fake->calls(Call::kMemCreate), 5);
  EXPECT_EQ(world.fake->faults(), 2);
  EXPECT_EQ(world.fake->Report().handles, 3) << "a failed call does nothing";
  const std::int64_t total = world.fake->total_calls();
  world.fake->FailAtAny(2, Result::kUnknown);
  EXPECT_EQ(driver.MemRelease(handles[0]), Result::kSuccess);
  int count = 0;
  EXPECT_EQ(driver.DeviceGetCount(&count), Result::kUnknown);
  EXPECT_EQ(driver.MemRelease(handles[1]), Result::kSuccess);
  EXPECT_EQ(world.fake->total_calls() - total, 3);
  world.fake->FailAt(Call::kMemRelease, 1, Result::kUnknown);
  world.fake->ClearFaults();
  EXPECT_EQ(driver.MemRelease(handles[4]), Result::kSuccess);
  world.Finish();
}

TEST(FakeDriverTest, OneLivesAtATime) {
  {
    World world;
    std::unique_ptr<FakeDriver> second;
    EXPECT_EQ(FakeDriver::Make({}, &second).code(), Code::kFailedPrecondition);
    world.Finish();
  }
  std::unique_ptr<FakeDriver> next;
  EXPECT_OK(FakeDriver::Make({}, &next));
  const Driver driver = next->driver();
  next.reset();
  int count = 0;
  EXPECT_EQ(driver.DeviceGetCount(&count), Result::kDeinitialized) << "who comes later finds nobody";
  FakeDriver::Options odd;
  odd.granularity = 1000;
  EXPECT_EQ(FakeDriver::Make(odd, &next).code(), Code::kInvalidArgument);
}

}  // namespace
}  // namespace kvpage
