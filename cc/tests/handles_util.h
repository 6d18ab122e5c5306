// Pools on the fake driver that hand sequences over as handles. For tests built with KVPAGE_TEST_FAKE_DRIVER.
#ifndef KVPAGE_TESTS_HANDLES_UTIL_H_
#define KVPAGE_TESTS_HANDLES_UTIL_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cache/handover.h"
#include "tests/sharing_util.h"

namespace kvpage::testing {

using cu::Call;
using cu::Result;
using handover::HandoverPtr;

// A pool and its program.
struct End {
  explicit End(const Geometry& geometry, int device = 0, std::int64_t blocks = 24)
      : pool(MakePool(geometry, blocks * geometry.num_ranges(), {}, MakeVmm(geometry, device))), program(pool.get()) {}
  ~End() { pool->Close(); }

  std::int32_t Begin(std::int32_t tokens, float stamp) {
    const std::int32_t slot = program.Acquire(tokens);
    WriteStamped(pool.get(), &program, slot, tokens, stamp);
    return slot;
  }
  std::int32_t BeginHandover(std::int32_t tokens, float stamp, std::int64_t room = 64) {
    const Claim claim = pool->AcquireHandover({room});
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    EXPECT_OK(program.Occupy(claim.slots[0]));
    WriteStamped(pool.get(), &program, claim.slots[0], tokens, stamp);
    return claim.slots[0];
  }
  HandoverPtr Export(std::int32_t slot) {
    HandoverPtr out;
    EXPECT_OK(pool->ExportBlocks(slot, "model", {}, &out));
    return out;
  }
  Status RunIn(const Claim& claim) {
    const auto tokens = static_cast<std::int32_t>(claim.tokens[0]);
    std::vector<std::int32_t> lengths(kSlots);
    std::uint32_t epoch = 0;
    const SlotEdit edit = {static_cast<std::int32_t>(SlotOpcode::kSwapIn), claim.slots[0], tokens,
                           static_cast<std::int32_t>(claim.shared[0])};
    Status status = EditOne(pool.get(), "import_blocks", program.cache(), edit, &epoch, lengths.data());
    if (status.ok()) program.Set(epoch, std::move(lengths));
    return status;
  }
  std::int32_t Import(const handover::Handover& received) {
    const Claim claim = pool->ImportBlocks(received, "model");
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    EXPECT_OK(RunIn(claim));
    return claim.slots[0];
  }
  void Release(std::int32_t slot) {
    program.Release(slot);
    std::int64_t freed = 0;
    EXPECT_OK(pool->Trim(&freed));
  }
  std::int64_t Stamped(std::int32_t slot, std::int64_t tokens, float stamp) {
    return CountStamped(pool.get(), slot, 0, tokens, stamp);
  }
  // The accounts, without handles that were created ahead of time.
  std::vector<std::int64_t> Accounts() {
    const PoolNumbers n = pool->Numbers();
    EXPECT_TRUE(AddsUp(pool.get()));
    EXPECT_OK(pool->Audit());
    return {n.blocks_free,    n.blocks_mapped,      n.blocks_received,    n.slots_occupied,
            n.slots_draining, n.handovers.exported, n.handovers.imported, n.handovers.bytes_copied_in};
  }

  std::shared_ptr<Pool> pool;
  Program program;
};

inline std::vector<int> Descriptors(const handover::Handover& sent) {
  std::vector<int> all = {sent.file->fd()};
  for (const Fd& fd : sent.handles) all.push_back(fd.get());
  return all;
}

inline HandoverPtr Received(const handover::Handover& sent) {
  HandoverPtr out;
  EXPECT_OK(handover::Receive(Descriptors(sent), &out));
  return out;
}

// Returns everything that a process with the descriptors can see: on the fake driver they are files.
inline std::string Content(const handover::Handover& sent) {
  std::string all;
  for (const int fd : Descriptors(sent)) {
    std::string bytes(static_cast<std::size_t>(lseek(fd, 0, SEEK_END)), '\0');
    EXPECT_EQ(pread(fd, bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    all += bytes;
  }
  return all;
}

inline std::int64_t Copies() {
  return Fake().calls(Call::kMemcpyDtoDAsync) + Fake().calls(Call::kMemcpyDtoHAsync) +
         Fake().calls(Call::kMemcpyHtoDAsync);
}

class HandlesTest : public ::testing::TestWithParam<Layout> {
 protected:
  const Geometry geometry_ = SmallGeometry(GetParam());
  const std::int64_t ranges_ = geometry_.num_ranges();
};

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_HANDLES_UTIL_H_
