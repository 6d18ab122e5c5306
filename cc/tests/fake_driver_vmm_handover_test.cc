// CudaVmm on the fake driver: blocks that are handed over and received. A call that can fail leaves everything
// unchanged when it does.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "tests/cuda_vmm_world.h"
#include "tests/expect_ok.h"
#include "vmm/cuda_vmm.h"
#include "vmm/memory_file.h"

namespace kvpage {
namespace {

std::vector<int> Numbers(const std::vector<Fd>& descriptors) {
  std::vector<int> numbers;
  for (const Fd& fd : descriptors) numbers.push_back(fd.get());
  return numbers;
}

// Asks the kernel instead of risking a fault.
bool Writable(char* at) {
  int ends[2];
  if (pipe(ends) != 0) return false;
  const char byte = *at;
  const bool writable = write(ends[1], &byte, 1) == 1 && read(ends[0], at, 1) == 1;
  close(ends[0]);
  close(ends[1]);
  return writable;
}

// The memory of two pools on one device. In the sender, blocks 1 and 2 belong to a file and are mapped at 4 and 5;
// block 0, mapped at 0, does not.
struct Pair : World {
  explicit Pair(FakeDriver::Options options = DefaultOptions()) : World(options) {
    EXPECT_OK(Make());
    EXPECT_OK(CudaVmm::Make(context, kPlaces * kBlock, kBlock, &other));
    for (CudaVmm* const each : {vmm.get(), other.get()}) EXPECT_OK(each->Grow(8));
    EXPECT_OK(MemoryFile::Make(4096, &file));
    EXPECT_OK(Create({0}));
    EXPECT_OK(vmm->Lend(file, lent.data(), offsets, 2));
    EXPECT_OK(Map(0, {0}));
    EXPECT_OK(Map(4, lent));
    for (int i = 0; i < 2; ++i) EXPECT_OK(vmm->Fill((4 + i) * kBlock, kBlock, 10 + i));
    EXPECT_OK(vmm->Fill(0, kBlock, 3));
  }
  ~Pair() { other.reset(); }
  Status Export(std::vector<Fd>* out) { return vmm->Export(lent.data(), 2, out); }
  Status Import(const std::vector<Fd>& sent, const Blocks& blocks) {
    return other->Import(Numbers(sent), blocks.data());
  }
  char* There(std::int64_t place) const { return other->base() + place * kBlock; }
  Status MapThere(std::int64_t place, const Blocks& blocks) {
    return other->MapReadOnly(place * kBlock, blocks.data(), static_cast<std::int64_t>(blocks.size()));
  }
  std::string Accounts() const {
    return fake->Report().ToString() + "; " + std::to_string(vmm->PhysicalBytes()) + ", " +
           std::to_string(other->PhysicalBytes());
  }

  std::unique_ptr<CudaVmm> other;
  std::shared_ptr<MemoryFile> file;
  const Blocks lent = {1, 2};
  const std::int64_t offsets[2] = {0, kBlock};
};

TEST(FakeDriverVmmHandoverTest, BlocksAreSharedWithoutACopyAndOutliveTheirPool) {
  Pair world;
  char* window = nullptr;
  ASSERT_OK(world.vmm->Window(&window));
  ASSERT_OK(world.other->Window(&window));
  EXPECT_EQ(world.vmm->NumLent(*world.file), 2);
  EXPECT_EQ(world.vmm->LentOffset(*world.file, 2), kBlock);
  EXPECT_EQ(world.vmm->LentOffset(*world.file, 0), -1);
  std::vector<Fd> sent;
  ASSERT_OK(world.Export(&sent));
  EXPECT_EQ(fcntl(sent[0].get(), F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  ASSERT_OK(world.vmm->MapReadOnly(4 * kBlock, world.lent.data(), 2));
  ASSERT_OK(world.vmm->Seal(world.file));
  EXPECT_FALSE(Writable(world.At(4)));
  EXPECT_TRUE(Writable(world.At(0)));
  const std::int64_t used = world.fake->Report().used_bytes;
  ASSERT_OK(world.Import(sent, {7, 3}));
  sent.clear();
  EXPECT_EQ(world.fake->Report().used_bytes, used);
  EXPECT_EQ(world.fake->calls(Call::kMemcpyDtoDAsync), 0);
  EXPECT_EQ(world.other->PhysicalBytes(), 0) << "the memory is the sender's";
  ASSERT_OK(world.MapThere(2, {7, 3}));
  for (int i = 0; i < 2; ++i) EXPECT_EQ(world.There(2 + i)[kBlock - 1], 10 + i);
  EXPECT_EQ(window[7 * kBlock], 10);
  EXPECT_FALSE(Writable(world.There(2)));
  EXPECT_FALSE(Writable(window + 3 * kBlock));
  world.vmm.reset();
  for (int i = 0; i < 2; ++i) EXPECT_EQ(world.There(2 + i)[0], 10 + i);
  ASSERT_OK(world.other->Unmap(2 * kBlock, Blocks{7, 3}.data(), 2));
  for (const std::int32_t block : {7, 3}) world.other->Return(block);
  EXPECT_EQ(world.fake->Report().imported, 0);
}

// Nor does anybody see what the block number holds later.
TEST(FakeDriverVmmHandoverTest, MemoryThatWasHandedOverIsNeverUsedAgain) {
  Pair world;
  std::vector<Fd> sent;
  ASSERT_OK(world.Export(&sent));
  ASSERT_OK(world.vmm->Seal(world.file));
  ASSERT_OK(world.Import(sent, {0, 1}));
  ASSERT_OK(world.MapThere(0, {0, 1}));
  ASSERT_OK(world.Unmap(4, world.lent));
  // The first attempt to free one fails, but its number still gets new memory.
  world.fake->FailAt(Call::kMemRelease, 1, Result::kUnknown);
  for (const std::int32_t block : world.lent) world.vmm->Return(block);
  EXPECT_EQ(world.fake->faults(), 1);
  world.fake->FailAt(Call::kMemRelease, 1, Result::kUnknown);
  EXPECT_FALSE(world.Create(world.lent).ok()) << "while it cannot be given up there is no other";
  ASSERT_OK(world.Create(world.lent));
  EXPECT_EQ(world.vmm->NumLent(*world.file), 0);
  ASSERT_OK(world.Map(4, world.lent));
  EXPECT_TRUE(Writable(world.At(4)));
  ASSERT_OK(world.vmm->Fill(4 * kBlock, 2 * kBlock, 99));
  for (int i = 0; i < 2; ++i) EXPECT_EQ(world.There(i)[0], 10 + i);
}

TEST(FakeDriverVmmHandoverTest, CopiesHaveTheBytesAndZerosBehindThem) {
  Pair world;
  std::vector<char> image(kBlock, 77);
  std::vector<Fd> sent;
  const std::int64_t payload = kBlock - 100;
  ASSERT_OK(world.vmm->ExportCopies({{0, nullptr}, {1, image.data()}}, payload, &sent));
  EXPECT_EQ(world.fake->calls(Call::kMemcpyDtoDAsync), 1);
  ASSERT_OK(world.Import(sent, {5, 6}));
  ASSERT_OK(world.MapThere(0, {5, 6}));
  for (int i = 0; i < 2; ++i) {
    const char* const at = world.There(i);
    const char byte = i == 0 ? 3 : 77;
    EXPECT_EQ(std::count(at, at + payload, byte), payload);
    EXPECT_EQ(std::count(at + payload, at + kBlock, 0), 100) << "of new memory, which is not zeros";
  }
  EXPECT_TRUE(Writable(world.At(0)));
  std::memset(world.At(0), 4, kBlock);
  EXPECT_EQ(world.There(0)[0], 3);
  // Also into existing blocks of the receiver.
  ASSERT_OK(world.other->Create(Blocks{2}.data(), 1));
  ASSERT_OK(world.other->ImportCopies({sent[1].get()}, Blocks{2}.data()));
  ASSERT_OK(world.other->Map(9 * kBlock, Blocks{2}.data(), 1));
  EXPECT_EQ(world.There(9)[0], 77);
  EXPECT_TRUE(Writable(world.There(9)));
}

TEST(FakeDriverVmmHandoverTest, ADriverThatGrantsNoReadOnlyAccessGrantsMore) {
  FakeDriver::Options options = World::DefaultOptions();
  options.read_only_access = false;
  Pair world(options);
  std::vector<Fd> sent;
  ASSERT_OK(world.Export(&sent));
  ASSERT_OK(world.vmm->Seal(world.file));
  ASSERT_OK(world.Import(sent, {0, 1}));
  ASSERT_OK(world.MapThere(0, {0, 1}));
  EXPECT_EQ(world.There(0)[0], 10);
  const std::int64_t calls = world.fake->calls(Call::kMemSetAccess);
  ASSERT_OK(world.MapThere(3, {0, 1}));
  EXPECT_EQ(world.fake->calls(Call::kMemSetAccess), calls + 1) << "it is asked once";
}

TEST(FakeDriverVmmHandoverTest, WhatIsNoBlockOfTheDeviceIsRefused) {
  FakeDriver::Options options = World::DefaultOptions();
  options.devices = 2;
  Pair world(options);
  std::shared_ptr<CudaContext> second;
  ASSERT_OK(CudaContext::Make(world.fake->driver(), 1, &second));
  std::unique_ptr<CudaVmm> far;
  ASSERT_OK(CudaVmm::Make(second, kPlaces * kBlock, kBlock, &far));
  ASSERT_OK(far->Grow(2));
  const std::string before = world.Accounts();
  std::string here, there;
  ASSERT_OK(world.vmm->MemoryName(&here));
  ASSERT_OK(far->MemoryName(&there));
  EXPECT_EQ(here, "GPU-66616b65-2047-5055-0000-000000000000");
  EXPECT_NE(here, there);
  std::vector<Fd> sent;
  ASSERT_OK(world.Export(&sent));
  const Status elsewhere = far->Import({sent[0].get()}, Blocks{0}.data());
  EXPECT_EQ(elsewhere.code(), Code::kInvalidArgument);
  EXPECT_TRUE(Mentions(elsewhere, "memory of another device (0) than the pool's (1)")) << elsewhere.message();
  Fd file(memfd_create("something else", MFD_CLOEXEC));
  ASSERT_EQ(ftruncate(file.get(), kBlock), 0);
  const Status other = world.other->Import({sent[0].get(), file.get()}, Blocks{0, 1}.data());
  EXPECT_EQ(other.code(), Code::kInvalidArgument);
  EXPECT_TRUE(Mentions(other, "no memory of this device that its driver has exported")) << other.message();
  EXPECT_EQ(world.Accounts(), before);
  Fd large(memfd_create("fake_driver_device_0", MFD_CLOEXEC));
  ASSERT_EQ(ftruncate(large.get(), 2 * kBlock), 0);
  ASSERT_OK(world.other->Import({large.get()}, Blocks{0}.data()));
  const Status size = world.MapThere(0, {0});
  EXPECT_EQ(size.code(), Code::kInvalidArgument);
  EXPECT_TRUE(Mentions(size, "no allocation of 65536 bytes")) << size.message();
  world.other->Return(0);
  ASSERT_OK(world.other->Create(Blocks{0}.data(), 1));
  EXPECT_EQ(world.other->ImportCopies({large.get()}, Blocks{0}.data()).code(), Code::kInvalidArgument);
  ASSERT_OK(world.other->Destroy(Blocks{0}.data(), 1));
  EXPECT_EQ(world.fake->Report().violations, 0);
  far.reset();
}

TEST(FakeDriverVmmHandoverTest, WhereTheDriverDoesNotShareItSaysSo) {
  FakeDriver::Options options = World::DefaultOptions();
  options.posix_handles_denied = true;  // takes effect when the first block is created
  World world(options);
  ASSERT_OK(world.Make());
  ASSERT_OK(world.vmm->Grow(2));
  std::shared_ptr<MemoryFile> file;
  ASSERT_OK(MemoryFile::Make(4096, &file));
  const std::int64_t offset = 0;
  for (int tries = 0; tries < 2; ++tries) {
    const Status status = world.vmm->Lend(file, Blocks{0}.data(), &offset, 1);
    EXPECT_EQ(status.code(), Code::kFailedPrecondition);
    EXPECT_TRUE(Mentions(status, "cannot be shared with other processes")) << status.message();
    EXPECT_EQ(world.vmm->PhysicalBytes(), 0);
    EXPECT_EQ(world.vmm->NumLent(*file), 0);
  }
  ASSERT_OK(world.Create({0}));
  std::vector<Fd> sent;
  EXPECT_EQ(world.vmm->Export(Blocks{0}.data(), 1, &sent).code(), Code::kFailedPrecondition);
  EXPECT_EQ(world.vmm->ExportCopies({{0, nullptr}}, kBlock, &sent).code(), Code::kFailedPrecondition);
}

// Fails the n-th driver call, then retries the operation.
template <class Operation>
void AtEveryCall(std::int64_t least, const Operation& operation) {
  std::int64_t n = 1;
  for (bool struck = true; struck; ++n) {
    Pair world;
    std::vector<Fd> sent;
    ASSERT_OK(world.Export(&sent));
    ASSERT_OK(world.other->Create(Blocks{2}.data(), 1));
    world.fake->FailAtAny(n, Result::kUnknown);
    const Status status = operation(&world, sent);
    world.fake->ClearFaults();
    struck = world.fake->faults() > 0;
    EXPECT_EQ(status.ok(), !struck) << n << ": " << status.message();
    if (!struck) break;
    EXPECT_OK(operation(&world, sent)) << n;
    world.other->Return(0);
    world.other->Return(1);
    EXPECT_EQ(world.fake->Report().imported, 0) << n;
    EXPECT_TRUE(Writable(world.At(0))) << n;
    EXPECT_EQ(world.At(4)[0], 10) << n;
    EXPECT_EQ(world.fake->Report().violations, 0) << n << ": " << world.fake->Report().first_violation;
  }
  EXPECT_GT(n, least);
}

TEST(FakeDriverVmmHandoverTest, FaultsWhileItImports) {
  AtEveryCall(4, [](Pair* world, const std::vector<Fd>& sent) {
    const std::string before = world->Accounts();
    const Status status = world->Import(sent, {0, 1});
    EXPECT_TRUE(status.ok() || world->Accounts() == before) << world->Accounts();
    return status;
  });
}

TEST(FakeDriverVmmHandoverTest, FaultsWhileItCopiesOut) {
  AtEveryCall(12, [](Pair* world, const std::vector<Fd>&) {
    std::vector<Fd> copies;
    const Status status = world->vmm->ExportCopies({{0, nullptr}, {1, nullptr}}, kBlock - 1, &copies);
    EXPECT_EQ(copies.size(), status.ok() ? 2u : 0u);
    return status;
  });
}

TEST(FakeDriverVmmHandoverTest, FaultsWhileItCopiesIn) {
  AtEveryCall(8, [](Pair* world, const std::vector<Fd>& sent) {
    return world->other->ImportCopies({sent[1].get()}, Blocks{2}.data());
  });
}

TEST(FakeDriverVmmHandoverTest, FaultsWhileItSeals) {
  AtEveryCall(2, [](Pair* world, const std::vector<Fd>&) {
    const Status status = world->vmm->Seal(world->file);
    EXPECT_EQ(Writable(world->At(4)), !status.ok());
    EXPECT_EQ(Writable(world->At(5)), !status.ok());
    return status;
  });
}

}  // namespace
}  // namespace kvpage
