// Sequences that are found by their tokens on a device: what the host can know of what was written.
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "tests/device_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

std::vector<std::int32_t> Sevens(std::int64_t count, std::int32_t last = 7) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count), 7);
  ids.back() = last;
  return ids;
}

// The release kernel tells the host how far the sequence was written.
TEST(DevicePrefixTest, AReleasedSequenceIsFoundAsFarAsItWasWritten) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const Claim claim = pool->AcquirePrefix({{Sevens(60), 60}}, {});
  const std::int32_t slot = claim.slots[0];
  program.Acquire(slot);
  program.Write(slot, 40);
  EXPECT_OK(pool->Commit(slot, Sevens(60)));  // more than has been written
  std::int64_t found = 0;
  EXPECT_OK(pool->FindPrefix("", Sevens(61), false, &found));
  EXPECT_EQ(found, 60) << "a fork's program checks what its donor has written";
  Release(pool.get(), &program, slot);
  EXPECT_OK(pool->FindPrefix("", Sevens(61), false, &found));
  EXPECT_EQ(found, 40);
  const Claim again = pool->AcquirePrefix({{Sevens(41, 8), 60}}, {});
  EXPECT_EQ(again.slots[0], slot);
  EXPECT_EQ(again.tokens[0], 40);
}

TEST(DevicePrefixTest, ANewGenerationKeepsWhatWasWritten) {
  Machine machine;
  const std::shared_ptr<Pool> pool = machine.MakePool(1, 16);
  DeviceProgram program(&machine, 1);
  program.Restart(pool.get());
  const std::int32_t slot = pool->AcquirePrefix({{Sevens(48), 0}}, {}).slots[0];
  program.Acquire(slot);
  program.Write(slot, 40);
  EXPECT_OK(pool->Commit(slot, Sevens(40)));
  EXPECT_OK(StartRelease(*pool, {slot}));  // its program never runs
  program.Restart(pool.get());
  std::int64_t found = 0;
  EXPECT_OK(pool->FindPrefix("", Sevens(41), false, &found));
  EXPECT_EQ(found, 40);
  // An adopted slot whose program never runs keeps its tokens.
  EXPECT_EQ(pool->AcquirePrefix({{Sevens(41, 8), 0}}, {}).slots[0], slot);
  program.Restart(pool.get());
  EXPECT_OK(pool->FindPrefix("", Sevens(41), false, &found));
  EXPECT_EQ(found, 40);
}

}  // namespace
}  // namespace kvpage::testing
