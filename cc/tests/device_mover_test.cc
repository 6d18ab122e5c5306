// Copies between a device and host memory on the fake driver, during captures and next to waiting programs.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <vector>

#include "tests/device_util.h"
#include "tests/expect_ok.h"
#include "vmm/cuda_mover.h"

namespace kvpage::testing {
namespace {

// Copies and their allocations work during any capture.
TEST(CudaMoverTest, BesideAGlobalCapture) {
  Machine machine;
  std::shared_ptr<BlockMover> mover;
  ASSERT_OK(CudaMover::Make(machine.device()->context(), &mover));
  DeviceMemory block;
  ASSERT_OK(DeviceMemory::Make(machine.device()->context(), 4096, "for a test", &block));
  const cu::Stream stream = machine.NewStream();
  machine.fake().BeginCapture(stream, FakeDriver::CaptureMode::kGlobal);
  {
    std::shared_ptr<char> from, to;
    EXPECT_OK(mover->MakeBuffer(4096, &from));
    EXPECT_OK(mover->MakeBuffer(4096, &to));
    std::memset(from.get(), 5, 4096);
    char* const at = reinterpret_cast<char*>(block.address());
    EXPECT_OK(mover->Copy(std::vector<BlockMover::ToBlock>{{at, from.get()}}, 4096));
    EXPECT_OK(mover->Copy(std::vector<BlockMover::ToHost>{{to.get(), at}}, 4096));
    EXPECT_EQ(std::memcmp(from.get(), to.get(), 4096), 0);
  }
  EXPECT_NE(machine.fake().EndCapture(stream), nullptr) << machine.fake().Report().ToString();
}

// Copies do not wait for a stream that programs are waiting on, and do not delay it.
TEST(CudaMoverTest, WaitsForNoProgram) {
  Machine machine;
  std::shared_ptr<BlockMover> mover;
  ASSERT_OK(CudaMover::Make(machine.device()->context(), &mover));
  DeviceMemory block;
  ASSERT_OK(DeviceMemory::Make(machine.device()->context(), 4096, "for a test", &block));
  machine.fake().HoldStream(machine.stream());
  machine.fake().Enqueue(machine.stream(), [] {});
  std::vector<char> pageable(4096, 5);
  EXPECT_OK(
      mover->Copy(std::vector<BlockMover::ToBlock>{{reinterpret_cast<char*>(block.address()), pageable.data()}}, 4096));
  EXPECT_EQ(machine.fake().Report().queued, 1);
  EXPECT_EQ(machine.fake().calls(cu::Call::kCtxSynchronize), 0);
  machine.fake().ReleaseStream(machine.stream());
}

}  // namespace
}  // namespace kvpage::testing
