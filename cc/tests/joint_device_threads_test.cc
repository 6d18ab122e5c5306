// Like joint_threads_test.cc, but for devices with mirrors. Also run under ThreadSanitizer.
#include <gtest/gtest.h>

#include <vector>

#include "tests/joint_churn.h"
#include "tests/joint_devices_util.h"

namespace kvpage::testing {
namespace {

void ChurnDevices(int devices, int rounds) {
  JointDevices joint(devices, 12);
  Churn(&joint, rounds, [&](int device, const Op& op, std::vector<char>* told) {
    DeviceProgram& program = *joint.programs[device];
    if (op.kind == Op::kOccupy) program.Acquire(op.slot);
    if (op.kind == Op::kVacate) program.Release(op.slot);
    if (op.kind == Op::kMap) {
      told->push_back(joint.MapOne(device, op.slot, op.tokens));
      const std::int32_t more = op.tokens - program.length(op.slot);
      if (told->back() != 0 && more > 0) program.Write(op.slot, more);
    }
    // Whichever thread finds work in a stream runs it. A map_slots handler also waits for queued work.
    EXPECT_OK(joint.machine.device(device)->Synchronize(joint.machine.stream(device)));
  });
  joint.ExpectNoFaults();
}

TEST(JointDeviceThreadsTest, TwoDevices) { ChurnDevices(2, 1500); }
TEST(JointDeviceThreadsTest, FourDevices) { ChurnDevices(4, 800); }

}  // namespace
}  // namespace kvpage::testing
