// The fake driver's shareable handles: the same rules as the real driver's, descriptors that work in other processes,
// and the lifetimes of handles, descriptors and memory.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <memory>

#include "testing/fake_driver.h"
#include "tests/expect_ok.h"
#include "vmm/cuda_context.h"

namespace kvpage {
namespace {

using cu::HandleType;
using cu::Result;

constexpr std::size_t kGrain = 65536;

class FakeShareableTest : public ::testing::Test {
 protected:
  FakeShareableTest() { Start({}); }
  ~FakeShareableTest() override {
    Stop();
    FakeDriver::State state = fake_->Report();
    EXPECT_EQ(state.violations, violations_) << state.first_violation;
    state.violations = 0;
    EXPECT_TRUE(state.empty()) << state.ToString();
  }
  void Start(FakeDriver::Options options) {
    Stop();
    fake_.reset();
    options.granularity = kGrain;
    options.device_bytes = 4 * kGrain;
    EXPECT_OK(FakeDriver::Make(options, &fake_));
    EXPECT_OK(CudaContext::Make(fake_->driver(), 0, &context_));
    scope_ = std::make_unique<ContextScope>(*context_);
  }
  void Stop() {
    scope_.reset();
    context_.reset();
  }
  const Driver& driver() const { return fake_->driver(); }
  Result Create(cu::MemHandle* handle, HandleType type = HandleType::kPosixFileDescriptor, int device = 0) const {
    cu::AllocationProp prop;
    prop.handle_type = type;
    prop.location.id = device;
    return driver().MemCreate(handle, kGrain, &prop, 0);
  }
  Result Export(cu::MemHandle handle, int* fd) const {
    return driver().MemExportToShareableHandle(fd, handle, HandleType::kPosixFileDescriptor, 0);
  }
  Result Import(int fd, cu::MemHandle* handle) const {
    return driver().MemImportFromShareableHandle(handle, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)),
                                                 HandleType::kPosixFileDescriptor);
  }
  char* Map(cu::MemHandle handle, cu::Access flags = cu::Access::kReadWrite) const {
    cu::DevicePtr at = 0;
    EXPECT_EQ(driver().MemAddressReserve(&at, kGrain, 0, 0, 0), Result::kSuccess);
    EXPECT_EQ(driver().MemMap(at, kGrain, 0, handle, 0), Result::kSuccess);
    cu::AccessDesc access;
    access.access = flags;
    EXPECT_EQ(driver().MemSetAccess(at, kGrain, &access, 1), Result::kSuccess);
    return reinterpret_cast<char*>(at);
  }
  void Unmap(char* at) const {
    EXPECT_EQ(driver().MemUnmap(reinterpret_cast<cu::DevicePtr>(at), kGrain), Result::kSuccess);
    EXPECT_EQ(driver().MemAddressFree(reinterpret_cast<cu::DevicePtr>(at), kGrain), Result::kSuccess);
  }
  void Release(cu::MemHandle handle) const { EXPECT_EQ(driver().MemRelease(handle), Result::kSuccess); }

  std::unique_ptr<FakeDriver> fake_;
  std::shared_ptr<CudaContext> context_;
  std::unique_ptr<ContextScope> scope_;
  std::int64_t violations_ = 0;
};

TEST_F(FakeShareableTest, AnImportedHandleIsTheSameMemoryAndKeepsIt) {
  cu::MemHandle mine = 0, theirs = 0;
  ASSERT_EQ(Create(&mine), Result::kSuccess);
  char* const here = Map(mine);
  std::memset(here, 5, kGrain);
  int fd = -1;
  ASSERT_EQ(Export(mine, &fd), Result::kSuccess);
  here[0] = 6;  // the existing mapping is unchanged
  ASSERT_EQ(Import(fd, &theirs), Result::kSuccess);
  EXPECT_NE(theirs, mine);
  EXPECT_EQ(fake_->Report().imported, 1);
  EXPECT_EQ(fake_->Report().used_bytes, static_cast<std::int64_t>(kGrain)) << "one piece of memory, two handles";
  char* const there = Map(theirs);
  EXPECT_EQ(there[0], 6);
  there[kGrain - 1] = 7;
  EXPECT_EQ(here[kGrain - 1], 7);
  Unmap(here);
  Release(mine);
  EXPECT_EQ(there[1], 5);
  EXPECT_EQ(fake_->Report().used_bytes, static_cast<std::int64_t>(kGrain));
  Unmap(there);
  Release(theirs);
  // A descriptor alone keeps the memory too.
  cu::MemHandle again = 0;
  ASSERT_EQ(Import(fd, &again), Result::kSuccess);
  close(fd);
  char* const late = Map(again, cu::Access::kRead);
  EXPECT_EQ(late[0], 6);
  Unmap(late);
  Release(again);
}

TEST_F(FakeShareableTest, AnotherProcessImportsIt) {
  cu::MemHandle mine = 0;
  ASSERT_EQ(Create(&mine), Result::kSuccess);
  char* const here = Map(mine);
  std::strcpy(here, "from the parent");
  int fd = -1;
  ASSERT_EQ(Export(mine, &fd), Result::kSuccess);
  const pid_t child = fork();
  if (child == 0) {
    // With a separate driver, as in another process.
    Unmap(here);
    Release(mine);
    FakeDriver::Options options;
    Start(options);
    cu::MemHandle theirs = 0;
    bool right = Import(fd, &theirs) == Result::kSuccess;
    char* const there = Map(theirs);
    right = right && std::strcmp(there, "from the parent") == 0;
    std::strcpy(there, "from the child");
    _exit(right && fake_->Report().violations == 0 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_STREQ(here, "from the child");
  close(fd);
  Unmap(here);
  Release(mine);
}

TEST_F(FakeShareableTest, WhatMayNotBeExportedIsNot) {
  cu::MemHandle plain = 0, gone = 0;
  int fd = -1;
  ASSERT_EQ(Create(&plain, HandleType::kNone), Result::kSuccess);
  EXPECT_EQ(Export(plain, &fd), Result::kInvalidValue) << "nobody asked for shareable handles";
  ASSERT_EQ(Create(&gone), Result::kSuccess);
  EXPECT_EQ(driver().MemExportToShareableHandle(&fd, gone, HandleType::kNone, 0), Result::kInvalidValue);
  EXPECT_EQ(driver().MemExportToShareableHandle(&fd, gone, HandleType::kPosixFileDescriptor, 1), Result::kInvalidValue);
  Release(gone);
  EXPECT_EQ(Export(gone, &fd), Result::kInvalidValue);
  cu::AllocationProp prop;
  EXPECT_EQ(driver().MemGetAllocationProperties(&prop, gone), Result::kInvalidValue);
  EXPECT_EQ(fd, -1);
  Release(plain);
  violations_ = 5;
}

// None of these is a violation: anybody may have sent the descriptor.
TEST_F(FakeShareableTest, DescriptorsOfSomethingElseAreRefused) {
  cu::MemHandle handle = 0;
  EXPECT_EQ(Import(-1, &handle), Result::kInvalidValue);
  const int file = memfd_create("something else", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(file, kGrain), 0);
  EXPECT_EQ(Import(file, &handle), Result::kInvalidValue);
  close(file);
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  EXPECT_EQ(Import(ends[0], &handle), Result::kInvalidValue);
  close(ends[0]);
  close(ends[1]);
  const int absent = memfd_create("fake_driver_device_7", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(absent, kGrain), 0);
  EXPECT_EQ(Import(absent, &handle), Result::kInvalidDevice);
  close(absent);
  // Its size differs from what the receiver expects: the driver does not map it.
  const int large = memfd_create("fake_driver_device_0", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(large, 2 * kGrain), 0);
  ASSERT_EQ(Import(large, &handle), Result::kSuccess);
  cu::DevicePtr at = 0;
  ASSERT_EQ(driver().MemAddressReserve(&at, kGrain, 0, 0, 0), Result::kSuccess);
  EXPECT_EQ(driver().MemMap(at, kGrain, 0, handle, 0), Result::kInvalidValue);
  EXPECT_EQ(driver().MemAddressFree(at, kGrain), Result::kSuccess);
  EXPECT_EQ(fake_->Report().used_bytes, static_cast<std::int64_t>(2 * kGrain));
  Release(handle);
  close(large);
}

TEST_F(FakeShareableTest, ALeakedImportIsSeen) {
  cu::MemHandle mine = 0, theirs = 0;
  ASSERT_EQ(Create(&mine), Result::kSuccess);
  int fd = -1;
  ASSERT_EQ(Export(mine, &fd), Result::kSuccess);
  ASSERT_EQ(Import(fd, &theirs), Result::kSuccess);
  close(fd);
  Release(mine);
  EXPECT_FALSE(fake_->Report().empty());
  EXPECT_NE(fake_->Report().ToString().find("1 of them imported"), std::string::npos) << fake_->Report().ToString();
  Release(theirs);
  EXPECT_EQ(fake_->Report().imported, 0);
}

TEST_F(FakeShareableTest, AHandleSaysOfWhichDeviceItIs) {
  FakeDriver::Options options;
  options.devices = 2;
  Start(options);
  cu::MemHandle handle = 0, imported = 0;
  std::shared_ptr<CudaContext> second;
  ASSERT_OK(CudaContext::Make(fake_->driver(), 1, &second));
  auto in_second = std::make_unique<ContextScope>(*second);
  ASSERT_EQ(Create(&handle, HandleType::kPosixFileDescriptor, 1), Result::kSuccess);
  in_second.reset();
  int fd = -1;
  ASSERT_EQ(Export(handle, &fd), Result::kSuccess);
  ASSERT_EQ(Import(fd, &imported), Result::kSuccess);
  cu::AllocationProp prop;
  ASSERT_EQ(driver().MemGetAllocationProperties(&prop, imported), Result::kSuccess);
  EXPECT_EQ(prop.location.id, 1);
  EXPECT_EQ(prop.handle_type, HandleType::kPosixFileDescriptor);
  cu::Uuid one, two;
  ASSERT_EQ(driver().DeviceGetUuid(&one, 0), Result::kSuccess);
  ASSERT_EQ(driver().DeviceGetUuid(&two, 1), Result::kSuccess);
  EXPECT_NE(std::memcmp(one.bytes, two.bytes, sizeof(one.bytes)), 0);
  close(fd);
  Release(imported);
  in_second = std::make_unique<ContextScope>(*second);
  Release(handle);
}

TEST_F(FakeShareableTest, ReadOnlyMemoryIsNotWritten) {
  cu::MemHandle handle = 0;
  ASSERT_EQ(Create(&handle), Result::kSuccess);
  char* const at = Map(handle, cu::Access::kRead);
  const cu::DevicePtr address = reinterpret_cast<cu::DevicePtr>(at);
  char byte = 0;
  EXPECT_EQ(driver().MemcpyDtoHAsync(&byte, address, 1, nullptr), Result::kSuccess);
  EXPECT_EQ(driver().MemsetD8Async(address, 1, 1, nullptr), Result::kInvalidValue);
  EXPECT_EQ(driver().MemcpyHtoDAsync(address, &byte, 1, nullptr), Result::kInvalidValue);
  violations_ = 2;
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  ASSERT_EQ(write(ends[1], "x", 1), 1);
  EXPECT_EQ(read(ends[0], at, 1), -1) << "a kernel's write would fault";
  close(ends[0]);
  close(ends[1]);
  Unmap(at);
  Release(handle);
}

}  // namespace
}  // namespace kvpage
