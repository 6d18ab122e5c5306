// Pools on a device beside stream captures (CUDA graphs): no host call disturbs a capture, destroyed streams are not
// touched, and the use of several streams is noticed. Also a driver whose mapping calls wait for kernels.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "tests/device_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

using Mode = FakeDriver::CaptureMode;

// A capture that this thread keeps open on another stream, as XLA does while it records a command buffer.
class OpenCapture {
 public:
  OpenCapture(Machine* machine, Mode mode) : machine_(machine), stream_(machine->NewStream()) {
    machine_->fake().BeginCapture(stream_, mode);
  }
  // Ends the capture; returns whether it is still valid.
  bool End() { return machine_->fake().EndCapture(stream_) != nullptr; }

 private:
  Machine* const machine_;
  const cu::Stream stream_;
};

// Captures a step that appends a token, and returns its graph.
std::shared_ptr<FakeDriver::Graph> CaptureWrite(Machine* machine, DeviceProgram* program, std::int32_t slot) {
  const cu::Stream stream = machine->NewStream();
  machine->fake().BeginCapture(stream, Mode::kThreadLocal);
  program->set_stream(stream);
  program->Write(slot, 1);
  program->set_stream(machine->stream());
  return machine->fake().EndCapture(stream);
}

TEST(DeviceCapturesTest, GenerationsAndPoolsEndBesideACaptureInAnotherThread) {
  for (const bool after_a_graph : {false, true}) {
    Machine machine;
    std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
    DeviceProgram program(&machine, 1);
    program.Restart(pool.get());
    const std::int32_t slot = Acquire(pool.get(), &program, 16);
    program.Write(slot, 3);
    if (after_a_graph) {
      machine.fake().LaunchGraph(CaptureWrite(&machine, &program, slot), machine.stream());
      EXPECT_EQ(program.length(slot), 4);
    }
    const auto during = [&](const char* what, Mode mode, const std::function<void()>& call) {
      OpenCapture capture(&machine, mode);
      std::thread host(call);
      host.join();
      EXPECT_TRUE(capture.End()) << what << ": " << machine.fake().Report().ToString();
    };
    during("a new generation", Mode::kGlobal, [&] { program.Restart(pool.get()); });
    EXPECT_EQ(program.length(slot), after_a_graph ? 4 : 3);
    during("a fault", Mode::kGlobal, [&] {
      program.Write(slot, 100);
      EXPECT_TRUE(Mentions(pool->TakeFault(), "mapped"));
    });
    during("close", Mode::kGlobal, [&] { pool->Close(); });
    during("the end", Mode::kThreadLocal, [&] { pool.reset(); });
  }
}

TEST(DeviceCapturesTest, StreamsThatAreGoneAreNotTouched) {
  // jax.clear_backends() destroys XLA's streams, and programs of the next client run on new ones.
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  cu::Stream old = nullptr;
  {
    const ContextScope scope(*machine.device()->context());
    EXPECT_EQ(machine.fake().driver().StreamCreate(&old, cu::kStreamNonBlocking), cu::Result::kSuccess);
  }
  program.set_stream(old);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  program.Write(slot, 3);
  {
    const ContextScope scope(*machine.device()->context());
    EXPECT_EQ(machine.fake().driver().StreamDestroy(old), cu::Result::kSuccess);
  }
  program.set_stream(machine.stream());
  program.Restart(pool.get());
  program.Write(slot, 1);
  EXPECT_EQ(program.length(slot), 4);
}

TEST(DeviceCapturesTest, SeveralComputeStreamsAreNoticedOnce) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  // A graph is captured on a different stream, and a destroyed client had another one.
  static_cast<void>(CaptureWrite(&machine, &program, slot));
  const cu::Stream next = machine.NewStream();
  program.set_stream(next);
  program.Write(slot, 1);
  program.Write(slot, 1);
  EXPECT_EQ(pool->TakeWarning(), "");
  program.set_stream(machine.stream());
  program.Write(slot, 1);
  EXPECT_NE(pool->TakeWarning().find("several compute streams"), std::string::npos);
  program.set_stream(next);
  program.Write(slot, 1);
  EXPECT_EQ(pool->TakeWarning(), "");
}

TEST(DeviceCapturesTest, OnlyMappingWaitsForKernels) {
  Machine machine(1, /*mapping_waits=*/true);
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16), other = machine.MakePool(2, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = Acquire(pool.get(), &program, 16);
  program.HoldAfterCheck(machine.stream());
  program.Write(slot, 1);
  std::atomic<int> done{0};
  std::thread threads[] = {
      std::thread([&] {
        EXPECT_OK(pool->Extend({slot}, {100}).status);
        ++done;
      }),
      std::thread([&] {
        std::int64_t freed = 0;
        EXPECT_OK(other->Acquire({16}).status);
        EXPECT_OK(other->Trim(&freed));
        ++done;
      }),
  };
  Pause();
  EXPECT_EQ(done, 0);
  // Neither handlers nor calls that only look at slots wait for them, or else the kernels might never end.
  program.Write(slot, 1);
  Release(pool.get(), &program, slot);
  EXPECT_FALSE(pool->WaitForDrain(0.001));
  EXPECT_OK(pool->TakeFault());
  EXPECT_OK(other->TakeFault());
  EXPECT_EQ(done, 0);
  machine.fake().ReleaseStream(machine.stream());
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool->Numbers().slots_draining, 0);
}

}  // namespace
}  // namespace kvpage::testing
