// The block table that programs on a device see, compared with the slots: it follows every host call, and a failing
// call leaves no program with the number of another owner's block.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/device_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

constexpr std::int32_t kId = 5;

// Blocks of one page and 16 tokens in either layout.
Geometry GeometryOf(Layout layout) {
  Geometry geometry;
  const std::int64_t dim = layout == Layout::kFused ? 16 : 64;
  EXPECT_OK(Geometry::Make({kLayers, 1, dim, kSlots, 128, 0, static_cast<std::int64_t>(layout), 16}, 4096, &geometry));
  return geometry;
}

struct Fixture {
  explicit Fixture(Layout layout, bool open = true) : ranges(GeometryOf(layout).num_ranges()), program(&machine, kId) {
    EXPECT_OK(machine.Open(kId, GeometryOf(layout), 20 * ranges, &pool));
    program.Restart(pool.get());
    first = Acquire(pool.get(), &program, 60);
    second = Acquire(pool.get(), &program, 20);
    for (const std::int32_t slot : {first, second}) Stamp(slot);
    if (open) {
      EXPECT_OK(pool->OpenTable());
    }
  }

  const DevicePool& entry() { return *machine.Find(kId); }
  // Calls see(pointer through the slots, pointer through the table) for a token of each block that programs may use.
  void ForEach(std::int32_t slot, const std::function<void(float*, float*)>& see) {
    const KVView slots = pool->View();
    for (std::int32_t layer = 0; layer < kLayers; ++layer) {
      KVView table = entry().table_view;
      table.table += layer * entry().table_layer_stride;
      for (std::int64_t token = 3; token < entry().slots[slot].room; token += 16) {
        for (const int kv : {0, 1}) {
          see(reinterpret_cast<float*>(slots.At(slot, token, layer, kv, 0)),
              reinterpret_cast<float*>(table.At(slot, token, layer, kv, 0)));
        }
      }
    }
  }
  void Stamp(std::int32_t slot) {
    const KVView slots = pool->View();
    for (std::int64_t token = 3; token < 20; token += 16) *Element(slots, slot, token) = 100.0f + slot;
  }
  static float* Element(const KVView& view, std::int32_t slot, std::int64_t token) {
    return reinterpret_cast<float*>(view.At(slot, token, 1, 1, 0));
  }
  // Returns whether the table leads to the slot's memory.
  bool Follows(std::int32_t slot) {
    bool same = true;
    ForEach(slot, [&](float* a, float* b) {
      const float before = *a;
      *a = ++stamp;
      same &= *b == stamp;
      *a = before;
    });
    return same;
  }
  // Returns whether the table leads to the same bytes.
  bool Shows(std::int32_t slot) {
    bool same = true;
    ForEach(slot, [&](const float* a, const float* b) { same &= *a == *b || (*a != *a && *b != *b); });
    return same;
  }
  std::int32_t Fork(std::int32_t donor, std::int32_t tokens) {
    const auto committed = static_cast<std::int32_t>(pool->Committed(donor).size());
    EXPECT_OK(pool->Commit(donor, std::vector<std::int32_t>(std::max(tokens - committed, 0), 7)));
    const Claim claim = pool->Fork("fork", {{donor, tokens}}, {});
    EXPECT_OK(claim.status);
    return claim.slots.at(0);
  }

  Machine machine;
  const std::int64_t ranges;
  std::shared_ptr<Pool> pool;
  DeviceProgram program;
  std::int32_t first = -1, second = -1;
  float stamp = 1.0f;
};

class DeviceBlockTableTest : public ::testing::TestWithParam<Layout> {};
INSTANTIATE_TEST_SUITE_P(Layouts, DeviceBlockTableTest, ::testing::Values(Layout::kFused, Layout::kPerLayer));

TEST_P(DeviceBlockTableTest, FollowsTheSlots) {
  Fixture f(GetParam());
  for (const std::int32_t slot : {f.first, f.second}) EXPECT_TRUE(f.Follows(slot));
  EXPECT_OK(f.pool->Extend({f.second, f.first}, {100, 70}).status);
  for (const std::int32_t slot : {f.first, f.second}) EXPECT_TRUE(f.Follows(slot));
  const std::int32_t fork = f.Fork(f.first, 48);
  EXPECT_TRUE(f.Follows(fork));
  EXPECT_OK(f.pool->Truncate({fork}, {20}).status);
  for (const std::int32_t slot : {f.first, fork}) EXPECT_TRUE(f.Follows(slot));
  Release(f.pool.get(), &f.program, f.second);
  const std::int32_t next = Acquire(f.pool.get(), &f.program, 128);  // adopts a slot and takes parked blocks
  for (const std::int32_t slot : {f.first, fork, next}) EXPECT_TRUE(f.Follows(slot));
  EXPECT_OK(f.pool->Resize(40 * f.ranges * 4096).status);
  const std::int32_t last = Acquire(f.pool.get(), &f.program, 128);
  for (const std::int32_t slot : {f.first, fork, next, last}) EXPECT_TRUE(f.Follows(slot));
}

TEST_P(DeviceBlockTableTest, CostsNothingBeforeItIsOpenAndLittleAfterwards) {
  Fixture f(GetParam(), /*open=*/false);
  EXPECT_EQ(f.entry().table_view.table, nullptr);
  const FakeDriver::State before = f.machine.fake().Report();
  EXPECT_OK(f.pool->OpenTable());
  const FakeDriver::State after = f.machine.fake().Report();
  EXPECT_EQ(after.mappings - before.mappings, (4 + 2) * f.ranges);
  EXPECT_EQ(after.reservations, before.reservations + 1);
  const std::int64_t copies = f.machine.fake().calls(cu::Call::kMemcpyHtoDAsync);
  EXPECT_OK(f.pool->Extend({f.first}, {100}).status);
  EXPECT_EQ(f.machine.fake().calls(cu::Call::kMemcpyHtoDAsync), copies + 2) << "the new blocks, and the room";
  EXPECT_OK(f.pool->OpenTable());
  EXPECT_EQ(f.machine.fake().Report().allocations, after.allocations);
}

// Injects a fault at each driver call of each host call.
TEST_P(DeviceBlockTableTest, CallsThatFailLeaveItAsItWas) {
  const std::vector<std::pair<const char*, std::function<Status(Fixture*, std::int32_t)>>> calls = {
      {"open", [](Fixture* f, std::int32_t) { return f->pool->OpenTable(); }},
      {"extend", [](Fixture* f, std::int32_t) { return f->pool->Extend({f->first, f->second}, {100, 70}).status; }},
      {"fork", [](Fixture* f, std::int32_t) { return f->pool->Fork("fork", {{f->first, 60}}, {}).status; }},
      {"truncate", [](Fixture* f, std::int32_t fork) { return f->pool->Truncate({fork}, {8}).status; }},
      {"acquire", [](Fixture* f, std::int32_t) { return f->pool->Acquire({100}).status; }}};
  for (const auto& [name, call] : calls) {
    const bool opens = std::string(name) == "open", forks = std::string(name) == "fork";
    bool struck = true;
    int refused = 0;
    for (int n = 1; struck && n < 200; ++n) {
      Fixture f(GetParam(), !opens);
      const std::int32_t fork = f.Fork(f.first, 48);
      EXPECT_OK(f.pool->Commit(f.first, std::vector<std::int32_t>(12, 7)));
      f.machine.fake().FailAtAny(n, cu::Result::kUnknown);
      const Status status = call(&f, fork);
      struck = f.machine.fake().faults() > 0;
      f.machine.fake().ClearFaults();
      // A fork also succeeds if the device is not told what it shares, which only makes programs slower.
      const bool untold = forks && struck && status.ok();
      EXPECT_EQ(status.ok(), !struck || untold) << name << " " << n;
      refused += !status.ok();
      if (opens && struck) {
        EXPECT_EQ(f.entry().table_view.table, nullptr) << n;
        EXPECT_OK(f.pool->OpenTable());
      }
      for (const std::int32_t slot : {f.first, f.second, fork}) EXPECT_TRUE(f.Shows(slot)) << name << " " << n;
      // Blocks that a program finds by number are not given to others. (Ask for more than the 20 blocks of each range.)
      std::vector<std::int32_t> others;
      for (std::int64_t tokens = 128; tokens > 0; tokens -= 16) {
        const Claim claim = f.pool->Acquire({tokens});
        if (!claim.status.ok()) continue;
        f.program.Acquire(claim.slots[0]);
        f.ForEach(claim.slots[0], [](float* a, float*) { *a = -1.0f; });
        others.push_back(claim.slots[0]);
      }
      for (const std::int32_t slot : {f.first, f.second, fork}) EXPECT_TRUE(f.Shows(slot)) << name << " " << n;
      for (const std::int32_t slot : others) Release(f.pool.get(), &f.program, slot);
      if (!struck) break;
      if (untold) continue;  // the fork has taken the last slot
      EXPECT_OK(call(&f, fork)) << name << " " << n;
      for (const std::int32_t slot : {f.first, f.second, fork}) EXPECT_TRUE(f.Follows(slot)) << name << " " << n;
    }
    EXPECT_FALSE(struck) << name << " never came through";
    EXPECT_GT(refused, 2) << name;
  }
}

// Holds an op on another stream between its check and its end, and asserts that `call` waits for it.
void ExpectWaits(Fixture* f, std::int32_t slot, const std::function<void()>& call,
                 const std::function<void()>& meanwhile) {
  const cu::Stream other = f->machine.NewStream();
  f->program.set_stream(other);
  f->program.HoldAfterCheck(other);
  f->program.Write(slot, 1);
  f->program.set_stream(f->machine.stream());
  std::atomic<bool> done{false};
  std::thread caller([&] {
    call();
    done = true;
  });
  Pause();
  EXPECT_FALSE(done);
  meanwhile();
  f->machine.fake().ReleaseStream(other);
  caller.join();
}

// Another thread queues readers while a truncation replaces blocks: those that have passed their check finish first,
// and no other passes it before the new blocks are mapped.
TEST_P(DeviceBlockTableTest, TruncationKeepsReadersOut) {
  Fixture f(GetParam());
  const std::int32_t fork = f.Fork(f.first, 48);
  f.program.Acquire(fork);
  BlockReferences before, now;
  EXPECT_OK(f.pool->BlockMap(fork, &before));
  const std::int32_t room = f.entry().slots[fork].room;
  const auto truncate = [&] { EXPECT_OK(f.pool->Truncate({fork}, {20}).status); };
  ExpectWaits(&f, fork, truncate, [&] {
    EXPECT_TRUE(Becomes(f.entry().slots[fork].room, 16)) << "the first block does not change";
    const int launches = f.program.launches();
    f.program.Write(fork, 17);
    EXPECT_EQ(f.program.launches(), launches);
    f.program.Write(fork, 16, /*advance=*/false);
    EXPECT_EQ(f.program.launches(), launches + 1);
    EXPECT_TRUE(Mentions(f.pool->TakeFault(), "17 tokens wanted, 16 mapped"));
  });
  EXPECT_EQ(f.entry().slots[fork].room, room);
  EXPECT_OK(f.pool->BlockMap(fork, &now));
  EXPECT_NE(now, before);
  EXPECT_TRUE(f.Follows(fork));
}

// The last sharer keeps its blocks: nothing is mapped, and nobody waits.
TEST_P(DeviceBlockTableTest, TruncationLeavesBlocksThatDoNotChange) {
  Fixture f(GetParam());
  const std::int32_t fork = f.Fork(f.first, 48);
  f.machine.fake().FailAt(cu::Call::kMemcpyDtoDAsync, 1, cu::Result::kUnknown);
  EXPECT_FALSE(f.pool->Truncate({fork}, {8}).status.ok());  // blocks stay set aside
  f.machine.fake().ClearFaults();
  Release(f.pool.get(), &f.program, f.first);
  const std::int64_t calls = f.machine.fake().calls(cu::Call::kMemMap);
  EXPECT_OK(f.pool->Truncate({fork}, {8}).status);
  EXPECT_EQ(f.machine.fake().calls(cu::Call::kMemMap), calls);
  EXPECT_TRUE(f.Follows(fork));
}

// The first slot keeps its reference to a block until the device knows the copy, so the second one needs a copy too.
TEST_P(DeviceBlockTableTest, SlotsThatShareOnlyWithEachOtherAreTruncatedTogether) {
  Fixture f(GetParam());
  const std::int32_t fork = f.Fork(f.first, 48);
  EXPECT_OK(f.pool->Truncate({f.first, fork}, {8, 24}).status);
  for (const std::int32_t slot : {f.first, fork}) {
    bool shares = true;
    EXPECT_OK(f.pool->SharesBehind(slot, slot == fork ? 24 : 8, &shares));
    EXPECT_FALSE(shares) << "slot " << slot;
    EXPECT_TRUE(f.Follows(slot)) << "slot " << slot;
  }
  EXPECT_OK(f.pool->Audit());
}

// A truncation that the device was not told of: no program uses the slot, which keeps its old blocks until a call that
// has waited for programs tells the device.
struct Unpublished : Fixture {
  explicit Unpublished(Layout layout) : Fixture(layout), fork(Fork(first, 48)) {
    // Fail after the copy that stops readers and the two that cut shared runs.
    machine.fake().FailAt(cu::Call::kMemcpyHtoDAsync, 4, cu::Result::kUnknown);
    EXPECT_FALSE(pool->Truncate({fork}, {8}).status.ok());
    machine.fake().ClearFaults();
    EXPECT_EQ(entry().slots[fork].room, 0);
    Release(pool.get(), &program, first);
    std::int64_t freed = 0;
    EXPECT_OK(pool->Trim(&freed));
    used = pool->Numbers().blocks_mapped;
  }
  void ExpectWhole() {
    EXPECT_EQ(entry().slots[fork].room, 48);
    EXPECT_TRUE(Follows(fork));
    EXPECT_LT(pool->Numbers().blocks_mapped, used) << "the old blocks are free";
    bool shares = true;
    EXPECT_OK(pool->SharesBehind(fork, 8, &shares));
    EXPECT_FALSE(shares);
  }

  const std::int32_t fork;
  std::int64_t used = 0;
};

TEST_P(DeviceBlockTableTest, BlocksStayUntilTheDeviceKnowsTheNewOnes) {
  const std::vector<std::function<void(Unpublished*)>> calls = {
      [](Unpublished* f) { EXPECT_OK(f->pool->Truncate({f->fork}, {8}).status); },
      [](Unpublished* f) { EXPECT_OK(f->pool->Extend({f->fork}, {49}).status); }};
  for (const auto& call : calls) {
    Unpublished f(GetParam());
    bool shares = false;
    EXPECT_OK(f.pool->SharesBehind(f.fork, 8, &shares));
    EXPECT_TRUE(shares) << "a caller that tries again must wait";
    ExpectWaits(&f, f.second, [&] { call(&f); }, [] {});
    if (&call == &calls.front()) {
      f.ExpectWhole();
    } else {
      EXPECT_TRUE(f.Follows(f.fork));
    }
  }
  Unpublished f(GetParam());
  f.program.Restart(f.pool.get());
  EXPECT_EQ(f.entry().slots[f.fork].room, 48) << "a new generation tells the device too";
}

TEST_P(DeviceBlockTableTest, OpensDuringACaptureOfTheSameThread) {
  Fixture f(GetParam(), /*open=*/false);
  const cu::Stream stream = f.machine.NewStream();
  f.machine.fake().BeginCapture(stream, FakeDriver::CaptureMode::kThreadLocal);
  {
    const UncapturedScope uncaptured(f.machine.fake().driver());
    EXPECT_OK(f.pool->OpenTable());
  }
  EXPECT_NE(f.machine.fake().EndCapture(stream), nullptr);
  EXPECT_TRUE(f.Follows(f.first));
}

// Must come last: from here on every pool of device 0 has a table. A pool that cannot have one does not prevent others
// from having theirs, and pools of other devices are left alone.
TEST(DeviceTablesTest, OneProgramOpensThoseOfItsDevice) {
  Machine machine(2);
  const std::shared_ptr<Pool> a = machine.MakePool(5, 4), b = machine.MakePool(6, 4), closed = machine.MakePool(7, 4);
  const std::shared_ptr<Pool> elsewhere = machine.MakePool(8, 4, /*device=*/1);
  const std::vector<std::shared_ptr<Pool>> pools = {a, b, closed, elsewhere};
  for (const std::shared_ptr<Pool>& pool : pools) Register(pool);
  closed->Close();
  const auto has_table = [&](std::int32_t id, int device = 0) {
    return machine.Find(id, device)->table_view.table != nullptr;
  };
  EXPECT_FALSE(device_tables_wanted(0));
  machine.fake().FailAt(cu::Call::kMemAddressReserve, 1, cu::Result::kOutOfMemory);
  OpenDeviceTables(0);
  EXPECT_TRUE(device_tables_wanted(0));
  EXPECT_FALSE(device_tables_open(0));
  EXPECT_EQ(has_table(5) + has_table(6), 1);
  OpenDeviceTables(0);
  EXPECT_TRUE(device_tables_open(0));
  EXPECT_TRUE(has_table(5) && has_table(6));
  EXPECT_FALSE(has_table(7));
  EXPECT_FALSE(has_table(8, 1));
  EXPECT_FALSE(device_tables_wanted(1));
  for (const std::shared_ptr<Pool>& pool : pools) Unregister(pool->id());
}

}  // namespace
}  // namespace kvpage::testing
