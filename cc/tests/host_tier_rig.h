// Helpers for tests of a pool whose evicted prefixes go to host memory: a mover that is slow or fails on demand.
#ifndef KVPAGE_TESTS_HOST_TIER_RIG_H_
#define KVPAGE_TESTS_HOST_TIER_RIG_H_

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "store/host_tier.h"
#include "tests/prefix_util.h"
#include "tests/store_util.h"
#include "vmm/block_mover.h"

namespace kvpage::testing {

// Reads memory that others may be writing: a copy of a block that is reused meanwhile is discarded. ThreadSanitizer
// must not see these reads, as it does not see those of a device's copy engine.
__attribute__((no_sanitize_thread)) inline void CopyUnseen(char* to, const volatile char* from, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// Copies of blocks that the host can access. Each waits after its first half while `hold` is set. If `fail` is n, the
// n-th copy from then on fails.
struct HeldMover : BlockMover {
  Status Copy(const std::vector<ToHost>& copies, std::int64_t bytes) override {
    return Each(
        copies,
        [&](const ToHost& copy, std::int64_t from, std::int64_t count) {
          CopyUnseen(copy.host + from, copy.block + from, count);
        },
        bytes);
  }
  Status Copy(const std::vector<ToBlock>& copies, std::int64_t bytes) override {
    return Each(
        copies,
        [&](const ToBlock& copy, std::int64_t from, std::int64_t count) {
          std::memcpy(copy.block + from, copy.host + from, count);
        },
        bytes);
  }
  Status MakeBuffer(std::int64_t bytes, std::shared_ptr<char>* out) override {
    if (fail_buffers) return ResourceExhausted("no memory to pin");
    out->reset(new char[bytes], std::default_delete<char[]>());
    return {};
  }
  template <class Copies, class Move>
  Status Each(const Copies& copies, const Move& move, std::int64_t bytes) {
    if (fail > 0 && --fail == 0) return Internal("a copy has failed");
    for (const auto& copy : copies) move(copy, 0, bytes / 2);
    ++waiting;
    while (hold) usleep(1000);
    --waiting;
    for (const auto& copy : copies) move(copy, bytes / 2, bytes - bytes / 2);
    return {};
  }

  std::atomic<bool> hold{false}, fail_buffers{false};
  std::atomic<int> waiting{0};
  std::atomic<int> fail{0};
};

class HostTierRig {
 public:
  HostTierRig(Layout layout, std::int64_t blocks, double write_ahead, std::shared_ptr<store::HostStore> store)
      : rig_(layout, blocks), store_(std::move(store)) {
    rig_.vmm->set_mover(mover_);
    EXPECT_OK(rig_.pool->AttachStore(std::make_shared<store::HostTier>(store_), write_ahead));
  }
  ~HostTierRig() { mover_->hold = false; }

  Pool& pool() { return *rig_.pool; }
  Program& program() { return *rig_.program; }
  HeldMover& mover() { return *mover_; }
  std::int64_t ranges() const { return rig_.geometry.num_ranges(); }
  std::int64_t logical_bytes() const { return ranges() * rig_.geometry.block_bytes; }
  prefix::SpillNumbers Spills() { return pool().StoreNumbers().spills; }

  // Runs and releases a sequence; returns the number of its tokens that were found. They must carry `stamp`, or by
  // default that of the sequence.
  std::int64_t Run(const std::vector<std::int32_t>& ids, float stamp = 0) {
    if (stamp == 0) stamp = static_cast<float>(ids[0]);
    const Claim claim = program().AcquirePrefix(ids);
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    const std::int32_t slot = claim.slots[0];
    const std::int64_t found = claim.tokens[0];
    const auto length = static_cast<std::int64_t>(ids.size());
    EXPECT_EQ(CountStamped(&pool(), slot, 0, found, stamp), found) << ids[0];
    EXPECT_OK(pool().Extend({slot}, {length}).status);
    EXPECT_OK(program().Write(slot, static_cast<std::int32_t>(length - found)));
    ForTokens(&pool(), slot, found, length, [&](float& at, float token) { at = 1000 * stamp + token; });
    EXPECT_OK(pool().Commit(slot, {ids.begin() + found, ids.end()}));
    program().Release(slot);
    return found;
  }
  std::int64_t Stored(const std::vector<std::int32_t>& ids) {
    std::int64_t stored = -1;
    EXPECT_OK(pool().StoredPrefix("", ids, &stored));
    return stored / 16;
  }
  void EvictAll() {
    std::int64_t freed = 0;
    EXPECT_OK(pool().Evict(1000, &freed));
    EXPECT_EQ(pool().Numbers().blocks_cached, 0);
  }
  // Reads what is stored, and returns the number of tokens read.
  std::int64_t Fetch(const std::vector<std::int32_t>& ids, std::string* error = nullptr) {
    std::shared_ptr<prefix::FetchTicket> ticket;
    EXPECT_OK(pool().Prefetch({"", ids, 0}, &ticket));
    EXPECT_TRUE(ticket->Wait(60));
    if (error != nullptr) *error = ticket->error();
    return ticket->tokens();
  }
  bool Whole() { return AddsUp(&pool()) && pool().Audit().ok(); }

 private:
  const std::shared_ptr<HeldMover> mover_ = std::make_shared<HeldMover>();
  PrefixRig rig_;
  const std::shared_ptr<store::HostStore> store_;
};

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_HOST_TIER_RIG_H_
