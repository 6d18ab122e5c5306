// Sequences of pools on a device that are swapped to memory of the host: with the kernels (on the emulated device) and
// the driver's copies (of the fake driver). What they hold, who waits, and what a driver that refuses leaves behind.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda/kernels.h"
#include "store/host_store.h"
#include "tests/device_util.h"
#include "tests/expect_ok.h"
#include "vmm/cuda_mover.h"

namespace kvpage::testing {
namespace {

using Layout = kvpage::Layout;

template <class Condition>
bool Soon(const Condition& condition) {
  for (int i = 0; i < 20000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

Geometry GeometryOf(Layout layout) {
  Geometry geometry;
  const std::int64_t head_dim = layout == Layout::kFused ? 16 : 64;
  if (!Geometry::Make({kLayers, 1, head_dim, kSlots, 128, 0, static_cast<std::int64_t>(layout), 16}, 4096, &geometry)
           .ok()) {
    std::abort();
  }
  return geometry;
}

// A machine with a pool, a store and a program with the CUDA kernels, which run as they are called.
class Rig {
 public:
  explicit Rig(Layout layout, std::int64_t store_blocks = 64, std::int64_t blocks = 20)
      : geometry_(GeometryOf(layout)) {
    EXPECT_OK(machine_.Open(300, geometry_, blocks * ranges(), &pool_));
    store_ = std::make_shared<store::HostStore>(store_blocks * ranges() * geometry_.block_bytes);
    handle_[0] = 300;
    Restart();
  }
  ~Rig() {
    pool_->Close();
    pool_.reset();
    store_->Close();
  }

  Machine& machine() { return machine_; }
  FakeDriver& fake() { return machine_.fake(); }
  Pool& pool() { return *pool_; }
  store::HostStore& store() { return *store_; }
  const std::shared_ptr<store::HostStore>& store_ptr() const { return store_; }
  std::int64_t ranges() const { return geometry_.num_ranges(); }
  std::int64_t logical_bytes() const { return ranges() * geometry_.block_bytes; }
  std::int32_t length(std::int32_t slot) const { return lengths_[slot]; }

  void Restart() {
    Pool::Generation generation;
    EXPECT_OK(pool_->NewGeneration(&generation));
    handle_[1] = generation.generation;
    epoch_ = generation.epoch;
    lengths_ = generation.lengths;
  }
  void Edit(DeviceOp op, const SlotEdit& edit) {
    EXPECT_OK(cuda::EditSlots(Cache(op), handle_, {&edit, 1, nullptr, 0}, &epoch_, lengths_.data(), nullptr, nullptr));
  }
  // Appends stamped tokens in every layer, advances and commits. Refused tokens are a fault of the pool's.
  void Write(std::int32_t slot, std::int32_t count, float stamp, bool commit = true) {
    const std::int32_t offsets[] = {0, count};
    const auto width = static_cast<std::size_t>(geometry_.head_dim);
    std::vector<float> rows(static_cast<std::size_t>(count) * width);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      rows[i] = stamp + static_cast<float>(lengths_[slot]) + static_cast<float>(i) / 4096;
    }
    cuda::BatchOperands batch = {&slot, offsets, 1, count};
    std::vector<char> scratch(cuda::CheckedBytes(1, 0) + 256);
    void* const checked = scratch.data() + (256 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 256);
    for (std::int32_t layer = 0; layer < kLayers; ++layer) {
      const cuda::AppendOperands append = {&layer,      rows.data(), rows.data(),
                                           DType::kF32, 1,           static_cast<std::int32_t>(width)};
      EXPECT_OK(cuda::AppendKV(Cache(DeviceOp::kAppendKV), batch, append, &epoch_, checked, nullptr));
    }
    batch.num_tokens = -1;
    EXPECT_OK(cuda::Advance(Cache(DeviceOp::kAdvance), batch, &epoch_, lengths_.data(), nullptr));
    if (!commit) return;
    EXPECT_OK(pool_->Commit(slot, std::vector<std::int32_t>(count, 7)));
  }
  std::int32_t Begin(std::int32_t tokens, float stamp) {
    const Claim claim = pool_->Acquire({tokens});
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    Edit(DeviceOp::kAcquire, {static_cast<std::int32_t>(SlotOpcode::kOccupy), claim.slots[0], 0});
    Write(claim.slots[0], tokens, stamp);
    return claim.slots[0];
  }
  std::int32_t Fork(std::int32_t donor) {
    const Claim claim = pool_->Fork("fork", {{donor, 32}}, {});
    EXPECT_OK(claim.status);
    Edit(DeviceOp::kFork, {static_cast<std::int32_t>(SlotOpcode::kFork), claim.slots[0],
                           static_cast<std::int32_t>(claim.tokens[0]), donor});
    return claim.slots[0];
  }
  SwapPtr StartOut(std::int32_t slot) {
    SwapPtr swap;
    EXPECT_OK(pool_->SwapOut(slot, store_, &swap));
    return swap;
  }
  void Vacate(std::int32_t slot) {
    Edit(DeviceOp::kSwapOut, {static_cast<std::int32_t>(SlotOpcode::kVacate), slot, 0});
  }
  SwapPtr Out(std::int32_t slot) {
    SwapPtr swap = StartOut(slot);
    Vacate(slot);
    return swap;
  }
  SwapPtr OutToStore(std::int32_t slot) {
    SwapPtr swap = Out(slot);
    EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kStored; })) << store_->Numbers().last_error;
    return swap;
  }
  void RunIn(const Claim& claim) {
    Edit(DeviceOp::kSwapIn, {static_cast<std::int32_t>(SlotOpcode::kSwapIn), claim.slots[0],
                             static_cast<std::int32_t>(claim.tokens[0]), static_cast<std::int32_t>(claim.shared[0])});
  }
  std::int32_t In(const SwapPtr& swap) {
    EXPECT_OK(pool_->Prefetch(swap).status);
    EXPECT_TRUE(swap->Wait(20));
    const Claim claim = pool_->SwapIn(swap);
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    RunIn(claim);
    return claim.slots[0];
  }
  // Every byte of the first tokens of a slot, as kernels find them.
  std::vector<char> Bytes(std::int32_t slot, std::int64_t tokens) {
    const KVView view = pool_->View();
    const std::size_t row = static_cast<std::size_t>(geometry_.head_dim) * sizeof(float);
    std::vector<char> bytes;
    for (std::int64_t token = 0; token < tokens; ++token) {
      for (std::int64_t layer = 0; layer < kLayers; ++layer) {
        for (int kv = 0; kv < 2; ++kv) {
          const char* const at = view.At(slot, token, layer, kv, 0);
          bytes.insert(bytes.end(), at, at + row);
        }
      }
    }
    return bytes;
  }
  // Nothing of a swapped sequence is anywhere.
  bool NothingLeft() {
    const PoolNumbers n = pool_->Numbers();
    return n.sequences_swapped == 0 && n.blocks_swapped == 0 && store_->Numbers().used_bytes == 0 && Adds();
  }
  bool Adds() {
    const PoolNumbers n = pool_->Numbers();
    return pool_->Audit().ok() &&
           n.blocks_total == n.blocks_mapped + n.blocks_parked + n.blocks_draining + n.blocks_free;
  }

 private:
  cuda::CacheOperands Cache(DeviceOp op) {
    cuda::CacheOperands cache;
    cache.op = op;
    cache.pools = machine_.device()->table();
    cache.handle = handle_;
    cache.epoch = &epoch_;
    cache.lengths = lengths_.data();
    cache.spec = geometry_.spec();
    return cache;
  }

  const Geometry geometry_;
  Machine machine_;
  std::shared_ptr<Pool> pool_;
  std::shared_ptr<store::HostStore> store_;
  std::int32_t handle_[2] = {0, 0};
  std::uint32_t epoch_ = 0;
  std::vector<std::int32_t> lengths_;
};

class DeviceSwappingTest : public ::testing::TestWithParam<Layout> {};
INSTANTIATE_TEST_SUITE_P(Layouts, DeviceSwappingTest, ::testing::Values(Layout::kFused, Layout::kPerLayer));

TEST_P(DeviceSwappingTest, ASequenceComesBackInAnotherSlot) {
  Rig rig(GetParam());
  const std::int32_t slot = rig.Begin(40, 1);
  const std::vector<char> before = rig.Bytes(slot, 40);
  const SwapPtr swap = rig.OutToStore(slot);
  EXPECT_EQ(rig.pool().Numbers().blocks_free, rig.pool().Numbers().blocks_total);
  EXPECT_EQ(rig.store().Numbers().used_bytes, 3 * rig.logical_bytes());
  const Status early = rig.pool().SwapIn(swap).status;
  EXPECT_TRUE(Mentions(early, "is in host memory: pool.prefetch")) << early.message();
  const std::int32_t other = rig.Begin(100, 50);
  EXPECT_EQ(other, slot);
  const std::int32_t back = rig.In(swap);
  ASSERT_NE(back, slot);
  EXPECT_EQ(rig.length(back), 40);
  EXPECT_EQ(rig.Bytes(back, 40), before);
  EXPECT_EQ(rig.pool().Committed(back).size(), 40u);
  // Behind its tokens there is nothing of another's.
  const std::vector<char> whole = rig.Bytes(back, 48);
  EXPECT_EQ(std::count(whole.begin() + static_cast<std::ptrdiff_t>(before.size()), whole.end(), '\0'),
            static_cast<std::ptrdiff_t>(whole.size() - before.size()));
  EXPECT_TRUE(rig.NothingLeft());
  // It goes on: there is room to be had, and all of it is its own to write.
  EXPECT_OK(rig.pool().Extend({back}, {70}).status);
  rig.Write(back, 30, 2);
  EXPECT_OK(rig.pool().TakeFault());
  EXPECT_EQ(rig.length(back), 70);
  EXPECT_EQ(rig.Bytes(back, 40), before);
  // Buffers are kept for the next sequence.
  const std::int64_t pinned = rig.fake().calls(cu::Call::kMemHostAlloc);
  const SwapPtr again = rig.OutToStore(other);
  EXPECT_EQ(rig.fake().calls(cu::Call::kMemHostAlloc), pinned + 7 - 3);
  EXPECT_GE(rig.In(again), 0);
}

TEST_P(DeviceSwappingTest, NothingIsTakenBeforeTheReleaseHasRun) {
  Rig rig(GetParam());
  const std::int32_t slot = rig.Begin(20, 1);
  EXPECT_OK(rig.pool().Extend({slot}, {24}).status);
  const SwapPtr swap = rig.StartOut(slot);
  Pause();
  EXPECT_EQ(swap->state(), SwapState::kQueued);
  EXPECT_EQ(rig.pool().SwapIn(swap).status.code(), Code::kFailedPrecondition);
  rig.Write(slot, 4, 3, /*commit=*/false);  // queued before; not committed, so not kept
  const std::vector<char> before = rig.Bytes(slot, 20);
  rig.Vacate(slot);
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kStored; }));
  EXPECT_EQ(swap->tokens(), 20);
  const std::int32_t back = rig.In(swap);
  EXPECT_EQ(rig.length(back), 20);
  EXPECT_EQ(rig.Bytes(back, 20), before);
}

TEST_P(DeviceSwappingTest, SharedBlocksStayAndAreNotWritten) {
  Rig rig(GetParam());
  const std::int32_t parent = rig.Begin(40, 1), child = rig.Fork(parent);
  EXPECT_OK(rig.pool().Extend({child}, {60}).status);
  rig.Write(child, 20, 5);
  const std::vector<char> before = rig.Bytes(child, 52);
  const SwapPtr swap = rig.OutToStore(child);
  EXPECT_EQ(rig.store().Numbers().used_bytes, 2 * rig.logical_bytes());
  EXPECT_EQ(rig.pool().Numbers().blocks_swapped, 2 * rig.ranges());
  const Claim claim = [&] {
    EXPECT_OK(rig.pool().Prefetch(swap).status);
    EXPECT_TRUE(swap->Wait(20));
    return rig.pool().SwapIn(swap);
  }();
  ASSERT_OK(claim.status);
  EXPECT_EQ(claim.shared[0], 32);
  rig.RunIn(claim);
  EXPECT_EQ(rig.Bytes(claim.slots[0], 52), before);
  EXPECT_EQ(rig.machine().Find(300)->slots[claim.slots[0]].shared, 32);
  rig.Edit(DeviceOp::kSetLengths, {static_cast<std::int32_t>(SlotOpcode::kSetLength), claim.slots[0], 40});
  rig.Write(claim.slots[0], 2, 9, /*commit=*/false);
  EXPECT_OK(rig.pool().TakeFault());
  EXPECT_TRUE(rig.NothingLeft());
}

TEST_P(DeviceSwappingTest, AFullStoreLeavesSequencesInMemory) {
  Rig rig(GetParam(), /*store_blocks=*/4);
  const std::int32_t first = rig.Begin(40, 1), second = rig.Begin(30, 2);
  const std::vector<char> before = rig.Bytes(second, 30);
  const SwapPtr stored = rig.OutToStore(first);
  const SwapPtr refused = rig.Out(second);
  EXPECT_TRUE(Soon([&] { return refused->state() == SwapState::kMemory; }));
  EXPECT_EQ(rig.store().Numbers().refused_writes, 1);
  EXPECT_NE(rig.store().Numbers().last_error.find("do not fit in a store of"), std::string::npos);
  EXPECT_EQ(rig.pool().Numbers().blocks_swapped, 2 * rig.ranges());
  EXPECT_EQ(rig.Bytes(rig.In(refused), 30), before);
  rig.pool().DropSwapped(stored);
  EXPECT_TRUE(rig.NothingLeft());
  EXPECT_LE(rig.store().Numbers().pinned_bytes, 4 * rig.logical_bytes());
}

// What the host swapped in has its sequence, also when the program that was to say so never runs.
TEST_P(DeviceSwappingTest, ANewGenerationKeepsWhatWasSwappedIn) {
  Rig rig(GetParam());
  const std::int32_t slot = rig.Begin(40, 1);
  const std::vector<char> before = rig.Bytes(slot, 40);
  const SwapPtr swap = rig.OutToStore(slot);
  EXPECT_OK(rig.pool().Prefetch(swap).status);
  EXPECT_TRUE(swap->Wait(20));
  const Claim claim = rig.pool().SwapIn(swap);
  ASSERT_OK(claim.status);
  rig.Restart();
  const std::int32_t back = claim.slots[0];
  EXPECT_EQ(rig.length(back), 40);
  EXPECT_EQ(rig.Bytes(back, 40), before);
  EXPECT_OK(rig.pool().Extend({back}, {50}).status);
  rig.Write(back, 10, 3);
  EXPECT_OK(rig.pool().TakeFault());
  EXPECT_EQ(rig.length(back), 50);
  EXPECT_TRUE(rig.NothingLeft());
}

// A release that never runs, because a new generation began: the sequence is taken then.
TEST_P(DeviceSwappingTest, ANewGenerationEndsTheWaitForARelease) {
  Rig rig(GetParam());
  const std::int32_t slot = rig.Begin(40, 1);
  const std::vector<char> before = rig.Bytes(slot, 40);
  const SwapPtr swap = rig.StartOut(slot);
  rig.Restart();
  EXPECT_EQ(rig.length(slot), -1);
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kStored; }));
  EXPECT_EQ(rig.Bytes(rig.In(swap), 40), before);
  EXPECT_TRUE(rig.NothingLeft());
}

TEST_P(DeviceSwappingTest, UndoneAndGivenUp) {
  Rig rig(GetParam());
  const std::int32_t slot = rig.Begin(40, 1);
  const std::vector<char> before = rig.Bytes(slot, 40);
  // The release was not queued: nothing has happened.
  const SwapPtr undone = rig.StartOut(slot);
  rig.pool().UndoEdits({{static_cast<std::int32_t>(SlotOpcode::kVacate), slot, 0}});
  EXPECT_EQ(undone->state(), SwapState::kGone);
  EXPECT_EQ(rig.Bytes(slot, 40), before);
  // The program that occupies the slot was not queued: the sequence is swapped out again, and nothing is copied.
  const SwapPtr swap = rig.OutToStore(slot);
  EXPECT_OK(rig.pool().Prefetch(swap).status);
  EXPECT_TRUE(swap->Wait(20));
  const Claim claim = rig.pool().SwapIn(swap);
  rig.pool().UndoSwapIn(swap, claim.slots[0]);
  EXPECT_EQ(swap->state(), SwapState::kMemory);
  EXPECT_EQ(rig.Bytes(rig.In(swap), 40), before);
  const SwapPtr dropped = rig.OutToStore(slot);
  rig.pool().DropSwapped(dropped);
  EXPECT_TRUE(rig.NothingLeft());
  EXPECT_EQ(rig.pool().Numbers().blocks_free, rig.pool().Numbers().blocks_total);
}

TEST_P(DeviceSwappingTest, TheStoreOrThePoolEndsFirst) {
  {
    Rig rig(GetParam());
    const SwapPtr stored = rig.OutToStore(rig.Begin(40, 1));
    const std::int32_t slot = rig.Begin(30, 2);
    const std::vector<char> before = rig.Bytes(slot, 30);
    const SwapPtr queued = rig.StartOut(slot);
    rig.store().Close();
    rig.Vacate(slot);
    EXPECT_EQ(queued->state(), SwapState::kQueued) << "nobody polls";
    EXPECT_EQ(rig.Bytes(rig.In(queued), 30), before);  // it never left
    EXPECT_OK(rig.pool().Prefetch(stored).status);
    EXPECT_TRUE(Mentions(rig.pool().SwapIn(stored).status, "(closed), and still has it"));
    SwapPtr refused;
    EXPECT_EQ(rig.pool().SwapOut(0, rig.store_ptr(), &refused).reason(), Reason::kClosed);
    rig.pool().DropSwapped(stored);
    EXPECT_TRUE(rig.NothingLeft());
  }
  Rig rig(GetParam());
  const SwapPtr stored = rig.OutToStore(rig.Begin(40, 1));
  const SwapPtr queued = rig.StartOut(rig.Begin(30, 2));
  rig.pool().Close();
  EXPECT_EQ(stored->state(), SwapState::kGone);
  EXPECT_EQ(queued->state(), SwapState::kGone);
  EXPECT_EQ(rig.store().Numbers().used_bytes, 0);
}

// Nothing that the store does disturbs the capture of a graph in another thread, where that is captured as XLA does it.
TEST_P(DeviceSwappingTest, BesideACapture) {
  Rig rig(GetParam());
  const std::int32_t slot = rig.Begin(40, 1);
  const std::vector<char> before = rig.Bytes(slot, 40);
  const SwapPtr swap = rig.StartOut(slot);
  const cu::Stream stream = rig.machine().NewStream();
  std::thread([&] { rig.fake().BeginCapture(stream, FakeDriver::CaptureMode::kThreadLocal); }).join();
  rig.Vacate(slot);
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kStored; })) << rig.store().Numbers().last_error;
  EXPECT_EQ(rig.Bytes(rig.In(swap), 40), before);
  EXPECT_NE(rig.fake().EndCapture(stream), nullptr) << rig.fake().Report().ToString();
}

// Copies and their memory stand any capture.
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

// A stream that programs wait on holds no copy up, and no copy waits for it.
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

// The n-th call of the driver fails, whichever it is and whoever makes it.
TEST_P(DeviceSwappingTest, AFaultAtEveryCall) {
  int failures = 0, stayed = 0, reread = 0, n = 1;
  for (bool struck = true; struck && n < 400; ++n) {
    Rig rig(GetParam());
    const std::int32_t slot = rig.Begin(40, 1);
    const std::vector<char> before = rig.Bytes(slot, 40);
    const std::int64_t faults = rig.fake().faults();
    rig.fake().FailAtAny(n, cu::Result::kUnknown);
    const auto twice = [&](const auto& call) {
      Status status = call();
      if (status.ok()) return;
      ++failures;
      EXPECT_TRUE(rig.Adds()) << n << ": " << status.message();
      status = call();
      EXPECT_OK(status) << n;
    };
    SwapPtr swap;
    twice([&] { return rig.pool().SwapOut(slot, rig.store_ptr(), &swap); });
    rig.Vacate(slot);
    const auto settled = [&] { return swap->state() == SwapState::kStored || swap->state() == SwapState::kMemory; };
    EXPECT_TRUE(Soon(settled)) << n;
    if (swap->state() == SwapState::kMemory) {
      ++stayed;
      EXPECT_EQ(rig.store().Numbers().failed_writes, 1) << n;
    }
    EXPECT_TRUE(rig.Adds()) << n;
    twice([&]() -> Status {
      KVPAGE_RETURN_IF_ERROR(rig.pool().Prefetch(swap).status);
      EXPECT_TRUE(swap->Wait(20)) << n;
      if (swap->state() == SwapState::kMemory) return {};
      ++reread;
      return FailedPrecondition(swap->error());
    });
    Claim claim;
    twice([&] { return (claim = rig.pool().SwapIn(swap)).status; });
    ASSERT_FALSE(claim.slots.empty()) << n;
    rig.RunIn(claim);
    EXPECT_EQ(rig.length(claim.slots[0]), 40) << n;
    EXPECT_EQ(rig.Bytes(claim.slots[0], 40), before) << n;
    struck = rig.fake().faults() > faults;
    rig.fake().ClearFaults();
    EXPECT_OK(rig.pool().Extend({claim.slots[0]}, {60}).status);
    rig.Write(claim.slots[0], 20, 2);
    EXPECT_OK(rig.pool().TakeFault());
    EXPECT_TRUE(rig.NothingLeft()) << n;
  }
  EXPECT_LT(n, 400);
  EXPECT_GT(failures, 5);
  EXPECT_GT(stayed, 3) << "buffers and copies to the host";
  EXPECT_GT(reread, 1) << "copies back";
}

}  // namespace
}  // namespace kvpage::testing
