// memfd and mmap alone: real allocation, aliases, holes, returning memory, counting calls.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <memory>
#include <vector>

#include "tests/expect_ok.h"
#include "vmm/limits.h"
#include "vmm/memfd_vmm.h"
#include "vmm/system_error.h"

namespace kvpage {
namespace {

constexpr std::int64_t kBlock = 16384;

std::unique_ptr<MemfdVmm> MakeVmm(std::int64_t virtual_blocks, std::int64_t blocks) {
  std::unique_ptr<MemfdVmm> vmm;
  EXPECT_OK(MemfdVmm::Make(virtual_blocks * kBlock, kBlock, &vmm));
  EXPECT_OK(vmm->Grow(blocks));
  return vmm;
}

TEST(VmmTest, CreateAllocatesForReal) {
  auto vmm = MakeVmm(4, 8);
  EXPECT_EQ(vmm->PhysicalBytes(), 0);
  const std::int32_t blocks[] = {0, 1, 5};
  EXPECT_OK(vmm->Create(blocks, 3));
  EXPECT_EQ(vmm->PhysicalBytes(), 3 * kBlock);
  EXPECT_OK(vmm->Destroy(blocks + 1, 2));
  EXPECT_EQ(vmm->PhysicalBytes(), kBlock);
}

TEST(VmmTest, TheSameBlockAtTwoAddresses) {
  auto vmm = MakeVmm(8, 2);
  const std::int32_t blocks[] = {1, 0, 1};
  EXPECT_OK(vmm->Create(blocks, 2));
  EXPECT_OK(vmm->Map(0, blocks, 3));
  std::memset(vmm->base(), 42, kBlock);
  EXPECT_EQ(static_cast<int>(vmm->base()[2 * kBlock + 100]), 42);
  EXPECT_EQ(static_cast<int>(vmm->base()[kBlock + 100]), 0);
  EXPECT_OK(vmm->Unmap(0, blocks, 1));
  EXPECT_EQ(static_cast<int>(vmm->base()[100]), 0) << "a hole reads as zeros";
  EXPECT_EQ(static_cast<int>(vmm->base()[2 * kBlock + 100]), 42) << "the other alias stays";
  EXPECT_EQ(vmm->PhysicalBytes(), 2 * kBlock);
}

TEST(VmmTest, TheWindowShowsEachBlockAtItsNumber) {
  auto vmm = MakeVmm(8, 4);
  const std::int32_t blocks[] = {3, 1};
  EXPECT_OK(vmm->Create(blocks, 2));
  EXPECT_OK(vmm->MapReadOnly(0, blocks, 2));
  char* window = nullptr;
  EXPECT_OK(vmm->Window(&window));
  std::memset(window + 3 * kBlock, 42, kBlock);
  EXPECT_EQ(static_cast<int>(vmm->base()[5]), 42);
  EXPECT_EQ(vmm->PhysicalBytes(), 2 * kBlock) << "blocks 0 and 2 have no memory";
  char* again = nullptr;
  EXPECT_OK(vmm->Grow(8));
  EXPECT_OK(vmm->Window(&again));
  EXPECT_EQ(again, window) << "reserved for what the machine could hold";
  const std::int32_t last = 7;
  EXPECT_OK(vmm->Create(&last, 1));
  EXPECT_OK(vmm->Map(4 * kBlock, &last, 1));
  std::memset(vmm->base() + 4 * kBlock, 43, kBlock);
  EXPECT_EQ(static_cast<int>(window[7 * kBlock + 9]), 43);
}

TEST(VmmTest, AWindowThatIsOutgrownStaysForThoseWhoUseIt) {
  auto vmm = MakeVmm(4, 2);
  char *window = nullptr, *larger = nullptr;
  EXPECT_OK(vmm->Window(&window));
  const std::int32_t block = 1;
  EXPECT_OK(vmm->Create(&block, 1));
  EXPECT_OK(vmm->Grow(4 * AvailableBytes() / kBlock));  // costs address space only
  EXPECT_OK(vmm->Window(&larger));
  EXPECT_NE(larger, window);
  std::memset(larger + kBlock, 42, kBlock);
  EXPECT_EQ(static_cast<int>(window[kBlock + 1]), 42);
}

TEST(VmmTest, HolesCostNothing) {
  auto vmm = MakeVmm(std::int64_t{1} << 20, 1);  // 16 GiB
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < (std::int64_t{1} << 20); i += 4096) sum += vmm->base()[i * kBlock];
  EXPECT_EQ(sum, 0);
  EXPECT_EQ(vmm->PhysicalBytes(), 0);
}

TEST(VmmTest, NeighboursAreMappedByOneCall) {
  auto vmm = MakeVmm(16, 16);
  const std::int32_t run[] = {4, 5, 6, 7};
  const std::int32_t scattered[] = {0, 2, 9, 12};
  EXPECT_OK(vmm->Create(run, 4));
  EXPECT_OK(vmm->Create(scattered, 4));
  std::int64_t before = vmm->system_calls();
  EXPECT_OK(vmm->Map(0, run, 4));
  EXPECT_EQ(vmm->system_calls() - before, 1);
  before = vmm->system_calls();
  EXPECT_OK(vmm->Map(8 * kBlock, scattered, 4));
  EXPECT_EQ(vmm->system_calls() - before, 4);
  for (int i = 0; i < 4; ++i) vmm->base()[(8 + i) * kBlock] = static_cast<char>(i + 1);
  EXPECT_OK(vmm->Unmap(8 * kBlock, scattered, 4));
  EXPECT_OK(vmm->Map(12 * kBlock, scattered + 2, 1));
  EXPECT_EQ(static_cast<int>(vmm->base()[12 * kBlock]), 3) << "unmapped blocks keep what they hold";
}

TEST(VmmTest, GivenBackMemoryComesBackAsZeros) {
  auto vmm = MakeVmm(2, 1);
  const std::int32_t block[] = {0};
  EXPECT_OK(vmm->Create(block, 1));
  EXPECT_OK(vmm->Map(0, block, 1));
  std::memset(vmm->base(), 1, kBlock);
  EXPECT_OK(vmm->Unmap(0, block, 1));
  EXPECT_OK(vmm->Destroy(block, 1));
  EXPECT_OK(vmm->Create(block, 1));
  EXPECT_OK(vmm->Map(0, block, 1));
  EXPECT_EQ(static_cast<int>(vmm->base()[kBlock - 1]), 0);
}

TEST(VmmTest, BlocksMoveWithTheirPageTableEntries) {
  auto vmm = MakeVmm(32, 16);
  const std::int32_t blocks[] = {4, 5, 6, 1, 0, 9};  // runs of three, one, one and one
  EXPECT_OK(vmm->Create(blocks, 6));
  EXPECT_OK(vmm->Map(0, blocks, 6));
  for (int i = 0; i < 6; ++i) std::memset(vmm->base() + i * kBlock, i + 1, kBlock);
  // Starts in the middle of a run, so that mappings are split.
  const std::int64_t before = vmm->system_calls();
  EXPECT_OK(vmm->Move(2 * kBlock, 20 * kBlock, blocks + 2, 4));
  EXPECT_EQ(vmm->system_calls() - before, 8) << "a move and a hole for each run";
  for (int i = 0; i < 2; ++i) EXPECT_EQ(static_cast<int>(vmm->base()[(i + 1) * kBlock - 1]), i + 1);
  for (int i = 2; i < 6; ++i) {
    EXPECT_EQ(static_cast<int>(vmm->base()[i * kBlock]), 0) << "a hole stays behind";
    EXPECT_EQ(static_cast<int>(vmm->base()[(18 + i) * kBlock]), i + 1);
    EXPECT_EQ(static_cast<int>(vmm->base()[(19 + i) * kBlock - 1]), i + 1);
  }
  // Moved blocks are ordinary blocks: they are written, moved back, unmapped and mapped again.
  std::memset(vmm->base() + 20 * kBlock, 7, kBlock);
  EXPECT_OK(vmm->Move(20 * kBlock, 2 * kBlock, blocks + 2, 4));
  EXPECT_EQ(static_cast<int>(vmm->base()[2 * kBlock]), 7);
  EXPECT_EQ(static_cast<int>(vmm->base()[20 * kBlock]), 0);
  EXPECT_OK(vmm->Unmap(0, blocks, 6));
  EXPECT_OK(vmm->Map(8 * kBlock, blocks, 6));
  EXPECT_EQ(static_cast<int>(vmm->base()[10 * kBlock]), 7);
  EXPECT_EQ(vmm->PhysicalBytes(), 6 * kBlock);
}

// Returns whether writing one byte kills the process, tried in a child.
bool WriteFaults(char* at) {
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGSEGV, SIG_DFL);  // otherwise a sanitizer would report it
    *static_cast<volatile char*>(at) = 1;
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV;
}

TEST(VmmTest, WritesThroughAReadOnlyMappingFault) {
  auto vmm = MakeVmm(8, 4);
  const std::int32_t blocks[] = {0, 1, 3}, own[] = {2};
  EXPECT_OK(vmm->Create(blocks, 3));
  EXPECT_OK(vmm->Create(own, 1));
  EXPECT_OK(vmm->Map(0, blocks, 3));
  const std::int64_t before = vmm->system_calls();
  EXPECT_OK(vmm->MapReadOnly(4 * kBlock, blocks, 3));
  EXPECT_EQ(vmm->system_calls() - before, 2) << "one for each run";
  for (int i = 0; i < 3; ++i) {
    std::memset(vmm->base() + i * kBlock, 40 + i, kBlock);
    EXPECT_EQ(static_cast<int>(vmm->base()[(5 + i) * kBlock - 1]), 40 + i);
    EXPECT_TRUE(WriteFaults(vmm->base() + (4 + i) * kBlock));
    EXPECT_FALSE(WriteFaults(vmm->base() + i * kBlock));
  }
  // A copy replaces the middle block: the others stay, and stay protected.
  EXPECT_OK(vmm->Copy(blocks + 1, own, 1));
  EXPECT_OK(vmm->Remap(5 * kBlock, blocks + 1, own, 1));
  EXPECT_EQ(static_cast<int>(vmm->base()[5 * kBlock + 9]), 41);
  std::memset(vmm->base() + 5 * kBlock, 7, kBlock);
  EXPECT_EQ(static_cast<int>(vmm->base()[kBlock + 9]), 41);
  for (const int place : {4, 6}) EXPECT_TRUE(WriteFaults(vmm->base() + place * kBlock));
  // The same block with a different protection.
  EXPECT_OK(vmm->Remap(6 * kBlock, blocks + 2, blocks + 2, 1));
  EXPECT_FALSE(WriteFaults(vmm->base() + 6 * kBlock));
  const std::int32_t now[] = {0, 2, 3};
  EXPECT_OK(vmm->Unmap(4 * kBlock, now, 3));
  EXPECT_EQ(static_cast<int>(vmm->base()[5 * kBlock]), 0);
  EXPECT_EQ(vmm->PhysicalBytes(), 4 * kBlock);
}

TEST(VmmTest, AnExchangedBlockIsMappedAsBefore) {
  auto vmm = MakeVmm(4, 4);
  const std::int32_t blocks[] = {0, 1, 2};
  EXPECT_OK(vmm->Create(blocks, 3));
  EXPECT_OK(vmm->Map(0, blocks, 1));
  EXPECT_OK(vmm->MapReadOnly(kBlock, blocks, 1));
  std::memset(vmm->base(), 42, kBlock);
  EXPECT_OK(vmm->Copy(blocks, blocks + 1, 1));
  EXPECT_OK(vmm->Exchange(0, 0, 1, /*writable=*/true));
  EXPECT_OK(vmm->Exchange(kBlock, 0, 1, /*writable=*/false));
  for (const std::int64_t place : {0, 1}) EXPECT_EQ(static_cast<int>(vmm->base()[place * kBlock + 100]), 42);
  vmm->base()[100] = 43;
  EXPECT_EQ(static_cast<int>(vmm->base()[kBlock + 100]), 43) << "both are block 1";
  EXPECT_TRUE(WriteFaults(vmm->base() + kBlock));
  EXPECT_FALSE(vmm->Exchange(0, 1, -1, true).ok());
  EXPECT_EQ(static_cast<int>(vmm->base()[100]), 43) << "what was there is there again";
}

TEST(VmmTest, HugePagesAgreeWithTheFile) {
  std::unique_ptr<MemfdVmm> vmm;
  const std::int64_t huge = HugePageBytes();
  if (huge == 0 || huge % kBlock != 0) return;
  EXPECT_OK(MemfdVmm::Make(2 * huge, kBlock, &vmm));
  ASSERT_EQ(vmm->huge_page_bytes(), huge);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(vmm->base()) % static_cast<std::uintptr_t>(huge), 0u);
  const auto count = static_cast<std::int32_t>(huge / kBlock);
  EXPECT_OK(vmm->Grow(count));
  std::vector<std::int32_t> blocks;
  for (std::int32_t i = 0; i < count; ++i) blocks.push_back(i);
  EXPECT_OK(vmm->Create(blocks.data(), count));
  EXPECT_OK(vmm->Map(huge, blocks.data(), count));
  std::memset(vmm->base() + huge, 42, static_cast<std::size_t>(huge));
  static_cast<void>(vmm->Collapse(0, count));  // the system may refuse
  EXPECT_EQ(static_cast<int>(vmm->base()[2 * huge - 1]), 42);
  EXPECT_EQ(vmm->PhysicalBytes(), huge);
  EXPECT_OK(vmm->Unmap(huge, blocks.data(), count));
  EXPECT_OK(vmm->Destroy(blocks.data(), count));
  EXPECT_EQ(vmm->PhysicalBytes(), 0);
}

TEST(VmmTest, TheWindowGrowsWithThePool) {
  auto vmm = MakeVmm(4, 2);
  const std::int32_t first[] = {0, 1}, late[] = {60, 63};
  EXPECT_OK(vmm->Create(first, 2));
  EXPECT_OK(vmm->Map(0, first, 1));
  std::memset(vmm->base(), 5, kBlock);
  EXPECT_OK(vmm->Copy(first, first + 1, 1));
  const std::int64_t before = vmm->system_calls();
  EXPECT_OK(vmm->Copy(first, first + 1, 1));
  EXPECT_EQ(vmm->system_calls(), before) << "a copy is no call once the window is mapped";
  EXPECT_EQ(vmm->PhysicalBytes(), 2 * kBlock);
  EXPECT_OK(vmm->Grow(64));
  EXPECT_OK(vmm->Create(late, 2));
  EXPECT_OK(vmm->Copy(first + 1, late, 1));
  EXPECT_OK(vmm->Copy(late, late + 1, 1));
  EXPECT_OK(vmm->Map(kBlock, late, 2));
  for (const int place : {1, 2}) EXPECT_EQ(static_cast<int>(vmm->base()[(place + 1) * kBlock - 1]), 5);
  EXPECT_EQ(vmm->PhysicalBytes(), 4 * kBlock) << "blocks without memory get none";
  EXPECT_OK(vmm->Unmap(kBlock, late, 2));
  EXPECT_OK(vmm->Destroy(late, 2));
  EXPECT_EQ(vmm->PhysicalBytes(), 2 * kBlock);
}

TEST(VmmTest, MoreThanThereIsIsAStatus) {
  // Harmless, because the check must come before any allocation, and nothing is touched. More than the machine has,
  // rather than more than is available now, because other programs may end in between.
  const std::int64_t blocks = MemoryLimitBytes() / kBlock + 1024;
  auto vmm = MakeVmm(1, blocks);
  std::vector<std::int32_t> all;
  for (std::int64_t i = 0; i < blocks; ++i) all.push_back(static_cast<std::int32_t>(i));
  const Status status = vmm->Create(all.data(), blocks);
  EXPECT_EQ(status.code(), Code::kResourceExhausted) << status.message();
  EXPECT_EQ(vmm->PhysicalBytes(), 0);
}

TEST(VmmTest, OddBlockSizesAreRefused) {
  std::unique_ptr<MemfdVmm> vmm;
  EXPECT_EQ(MemfdVmm::Make(1 << 20, 5000, &vmm).code(), Code::kInvalidArgument);
  const Status status = MemfdVmm::Make(std::int64_t{1} << 62, 4096, &vmm);
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_NE(status.message().find("max_seq_len"), std::string::npos) << status.message();
}

TEST(VmmTest, OnlyShortMemoryIsResourceExhausted) {
  for (const int error : {ENOMEM, ENOSPC, EAGAIN}) {
    EXPECT_EQ(SystemError("fallocate", 4096, error).code(), Code::kResourceExhausted) << error;
  }
  for (const int error : {EPERM, EACCES, ENOSYS, EOPNOTSUPP}) {
    const Status status = SystemError("memfd_create", -1, error);
    EXPECT_EQ(status.code(), Code::kFailedPrecondition) << error;
    EXPECT_EQ(status.message().rfind("memfd_create failed: ", 0), std::size_t{0}) << status.message();
    EXPECT_NE(status.message().find("seccomp"), std::string::npos) << status.message();
  }
  EXPECT_NE(SystemError("memfd_create", -1, EMFILE).message().find("ulimit -n"), std::string::npos);
  EXPECT_NE(SystemError("ftruncate", 4096, EFBIG).message().find("ulimit -f"), std::string::npos);
  EXPECT_EQ(SystemError("fallocate", 4096, EIO).code(), Code::kInternal);
}

}  // namespace
}  // namespace kvpage
