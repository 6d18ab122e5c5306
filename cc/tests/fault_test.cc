// A fault that a device recorded gives the same status as the same mistake in a CPU program.
#include "device/fault.h"

#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "cache/registry.h"
#include "tests/expect_ok.h"
#include "tests/pool_util.h"

namespace kvpage::testing {
namespace {

Fault Make(DeviceOp op, FaultKind kind, std::int32_t slot = -1, std::int64_t wanted = 0, std::int64_t have = 0,
           std::int32_t index = -1, std::int32_t layer = -1) {
  Fault fault;
  fault.set = 1;
  fault.op = static_cast<std::int32_t>(op);
  fault.kind = static_cast<std::int32_t>(kind);
  fault.slot = slot;
  fault.wanted = wanted;
  fault.have = have;
  fault.index = index;
  fault.layer = layer;
  return fault;
}

}  // namespace

TEST(FaultTest, FaultsReadAsOnCpu) {
  const std::shared_ptr<Pool> pool = MakePool(SmallGeometry(), 32);
  pool->set_id(77);
  Program program(pool.get());
  const std::int32_t a = program.Acquire(32);
  const std::int32_t b = program.Acquire(16);
  EXPECT_OK(program.Write(a, 10));
  const CacheRef good = program.cache();
  const std::vector<std::int32_t> lengths(good.lengths, good.lengths + kSlots);
  const auto same = [&](const Fault& fault, const Status& cpu) {
    const Status device = DescribeFault(fault, 77, pool->geometry().spec());
    EXPECT_FALSE(cpu.ok());
    EXPECT_EQ(device.message(), cpu.message());
    EXPECT_EQ(static_cast<int>(device.code()), static_cast<int>(cpu.code()));
  };
  const auto begin = [&](const char* op, CacheRef cache, std::vector<std::int32_t> slots,
                         std::vector<std::int32_t> offsets, std::int64_t layer, bool append,
                         std::int64_t tokens) -> Status {
    PinnedSlots pinned;
    return pool->Begin(op, cache, {slots.data(), static_cast<std::int64_t>(slots.size()), offsets.data(), tokens},
                       layer, append, &pinned);
  };
  const auto append = [&](CacheRef cache, std::vector<std::int32_t> slots, std::vector<std::int32_t> offsets,
                          std::int64_t tokens = 100, std::int64_t layer = 0) {
    return begin("append_kv", cache, std::move(slots), std::move(offsets), layer, true, tokens);
  };
  using Op = DeviceOp;
  using Kind = FaultKind;

  CacheRef cache = good;
  cache.generation = 0;
  same(Make(Op::kAppendKV, Kind::kGeneration, -1, 0, good.generation), append(cache, {a}, {0, 1}));
  cache = good;
  cache.epoch -= 1;
  same(Make(Op::kAppendKV, Kind::kEpoch, -1, cache.epoch, good.epoch), append(cache, {a}, {0, 1}));
  same(Make(Op::kAppendKV, Kind::kSlotRange, 9), append(good, {9}, {0, 1}));
  same(Make(Op::kAppendKV, Kind::kSlotTwice, a), append(good, {a, a}, {0, 1, 2}));
  same(Make(Op::kAppendKV, Kind::kSlotFree, 3), append(good, {3}, {0, 1}));
  same(Make(Op::kAppendKV, Kind::kOffsetsStart, -1, 0, 1), append(good, {a}, {1, 2}));
  same(Make(Op::kAppendKV, Kind::kOffsetsOrder, -1, 2, 1, 1), append(good, {a, b}, {0, 2, 1}));
  same(Make(Op::kAppendKV, Kind::kOffsetsEnd, -1, 5, 4), append(good, {a}, {0, 5}, 4));
  same(Make(Op::kAppendKV, Kind::kLayer, -1, 2), append(good, {a}, {0, 1}, 100, 2));
  same(Make(Op::kAppendKV, Kind::kMaxSeqLen, a, 150), append(good, {a}, {0, 140}, 140));
  same(Make(Op::kUpdateAndAttend, Kind::kUnmapped, a, 33, 32),
       begin("update_and_attend", good, {a}, {0, 23}, 0, true, 23));
  std::vector<std::int32_t> longer = lengths;
  longer[b] = 7;
  cache = good;
  cache.lengths = longer.data();
  same(Make(Op::kAppendKV, Kind::kLength, b, 7, 0, -1, 1), append(cache, {b}, {0, 1}, 100, 1));
  {
    const std::shared_ptr<Pool> debugging = MakePool(SmallGeometry(), 32, {false, /*poison=*/true, /*debug=*/true});
    Program twice(debugging.get());
    const std::int32_t slot = twice.Acquire(32);
    EXPECT_OK(twice.Write(slot, 10));
    const std::int32_t one[] = {0, 1};
    const auto write = [&] {
      PinnedSlots pinned;
      return debugging->Begin("append_kv", twice.cache(), {&slot, 1, one, 1}, 1, true, &pinned);
    };
    EXPECT_OK(write());
    twice.Restart();  // positions past the length do not count as written
    EXPECT_OK(write());
    CacheRef next = twice.cache();
    ++next.epoch;
    PinnedSlots pinned;
    same(Make(Op::kAppendKV, Kind::kWrittenTwice, slot, 10, 0, -1, 1),
         debugging->Begin("append_kv", next, {&slot, 1, one, 1}, 1, true, &pinned));
  }
  same(Make(Op::kPagedAttention, Kind::kUnwritten, a, 11, 10, -1, 1),
       begin("paged_attention", good, {a}, {0, 1}, 1, false, 1));
  same(Make(Op::kGatherContext, Kind::kUnwritten, b, 1, 0, -1, 0),
       begin("read_kv / paged_attention (xla)", good, {b}, {0, 1}, 0, false, -1));

  std::uint32_t epoch = 0;
  std::vector<std::int32_t> out(kSlots);
  const std::int32_t offsets[] = {0, 3};
  Fault unwritten = Make(Op::kAdvance, Kind::kUnwritten, a, 13, 10);
  const std::int32_t both[] = {10, 10};
  unwritten.runs = FindWrittenRuns(both, 2, 99);
  same(unwritten, pool->Advance("advance", good, {&a, 1, offsets, -1}, &epoch, out.data()));
  const std::int32_t eleven = 11;
  same(Make(Op::kSetLengths, Kind::kRaise, a, 11, 10),
       pool->SetLengths("set_lengths", good, &a, &eleven, 1, &epoch, out.data()));
  same(Make(Op::kAcquire, Kind::kSlotTaken, a), EditOne(pool.get(), "acquire", good, {0, a, 0}, &epoch, out.data()));
  same(Make(Op::kRelease, Kind::kSlotFree, 3), EditOne(pool.get(), "release", good, {1, 3, 0}, &epoch, out.data()));
  same(Make(Op::kRelease, Kind::kOpcode, a, 77), EditOne(pool.get(), "release", good, {77, a, 0}, &epoch, out.data()));
  const auto copy = [&](const std::vector<TokenCopy>& copies) {
    PinnedSlots pinned;
    return pool->EditSlots("acquire", good, {nullptr, 0, copies.data(), static_cast<std::int64_t>(copies.size())},
                           &pinned, &epoch, out.data());
  };
  same(Make(Op::kAcquire, Kind::kCopyTokens, b, -1, 4), copy({{a, b, -1, 4}}));
  same(Make(Op::kAcquire, Kind::kCopyTwice, b), copy({{a, b, 0, 4}, {a, b, 0, 2}}));
  same(Make(Op::kAcquire, Kind::kCopyChain, a), copy({{a, a, 0, 4}}));
  const std::int32_t negative = -1;
  bool ok = false;
  same(Make(Op::kMapSlots, Kind::kMaxSeqLen, a, -1), pool->MapSlots("map_slots", good, &a, &negative, 1, &ok, &epoch));
  {
    Program sharer(pool.get());
    EXPECT_OK(pool->Commit(a, std::vector<std::int32_t>(10, 7)));
    EXPECT_OK(sharer.Write(a, 8));
    EXPECT_OK(pool->Commit(a, std::vector<std::int32_t>(8, 7)));
    const Claim claim = pool->Fork("fork", {{a, 16}}, {});
    EXPECT_OK(claim.status);
    const std::int32_t slot = claim.slots[0];
    const SlotEdit edits[] = {{static_cast<std::int32_t>(SlotOpcode::kFork), slot, 16, a},
                              {static_cast<std::int32_t>(SlotOpcode::kSetLength), a, 3}};
    {
      PinnedSlots pinned;
      same(Make(Op::kFork, Kind::kDonorEdited, slot, 0, a),
           pool->EditSlots("fork", sharer.cache(), {edits, 2, nullptr, 0}, &pinned, &epoch, out.data()));
    }
    EXPECT_OK(sharer.RunFork(slot, a, 16));
    const std::int32_t nine = 9;
    same(Make(Op::kSetLengths, Kind::kBelowShared, a, 9, 16),
         pool->SetLengths("set_lengths", sharer.cache(), &a, &nine, 1, &epoch, out.data()));
    std::vector<std::int32_t> shorter(sharer.cache().lengths, sharer.cache().lengths + kSlots);
    shorter[a] = 5;
    CacheRef forged = sharer.cache();
    forged.lengths = shorter.data();
    same(Make(Op::kAppendKV, Kind::kShared, a, 5, 16), append(forged, {a}, {0, 1}));
  }
  SpecInts other = pool->geometry().spec();
  other[3] = 8;
  same(Make(Op::kAdvance, Kind::kSpec, -1, 8, kSlots, 3), pool->CheckProgram("advance", other));

  // An old cache, after its tokens of the slot were rolled back.
  program.Restart();
  EXPECT_OK(pool->Truncate({a}, {5}).status);
  const CacheRef late = program.cache();
  const std::vector<std::int32_t> old_lengths(late.lengths, late.lengths + kSlots);
  EXPECT_OK(program.RunTruncate(a, 5));
  cache = late;
  cache.lengths = old_lengths.data();
  same(Make(Op::kPagedAttention, Kind::kSlotEpoch, a, late.epoch, program.cache().epoch),
       begin("paged_attention", cache, {a}, {0, 1}, 0, false, 1));
  pool->Close();
  same(Make(Op::kAppendKV, Kind::kClosed), append(program.cache(), {a}, {0, 1}));
}

TEST(FaultTest, FaultsOfPoolsThatAreNotThere) {
  const std::shared_ptr<Pool> pool = MakePool(SmallGeometry(), 32);
  Register(pool);
  const std::int32_t id = pool->id();
  const auto describe = [&](std::int32_t wanted) {
    return DescribeFault(Make(DeviceOp::kAdvance, FaultKind::kNoPool, -1, 0, wanted), -1, {});
  };
  EXPECT_TRUE(Mentions(describe(id), "is not on the device that the program ran on"));
  std::shared_ptr<Pool> found;
  EXPECT_EQ(describe(id ^ 1).message(), Find("advance", id ^ 1, &found).message());
  EXPECT_TRUE(Mentions(describe(-id), "there is no pool"));
  Unregister(id);
  EXPECT_EQ(describe(id).message(), Find("advance", id, &found).message());
  EXPECT_TRUE(Mentions(describe(id), "is closed: make a new pool"));
  EXPECT_TRUE(Mentions(DescribeFault(Make(DeviceOp::kAcquire, FaultKind::kForeignCache, -1, 3, 4), 3, {}),
                       "acquire: this cache belongs to pool 3, but pool 4 was called"));
  EXPECT_TRUE(Mentions(DescribeFault(Make(DeviceOp::kAcquire, static_cast<FaultKind>(99)), 3, {}), "unknown kind 99"));
}

}  // namespace kvpage::testing
