// The properties of the driver that CudaVmm relies on, checked on this machine. With --fake they are checked on the
// fake driver, which must give the same answers or be stricter. A plain program without GoogleTest, because
// benchmarks/run_gpu.sh builds and runs it on GPU machines that may lack that package.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "testing/fake_driver.h"
#include "vmm/cuda_vmm.h"
#include "vmm/memory_file.h"

namespace kvpage {
namespace {

using cu::Result;

bool g_fake_wanted = false;
int g_failures = 0;

// Reports and counts a wrong answer, and continues.
void Expect(bool right, const std::string& what = "wrong answer", int line = __builtin_LINE()) {
  if (right) return;
  ++g_failures;
  std::fprintf(stderr, "%s:%d: %s\n", __FILE__, line, what.c_str());
}
void ExpectOk(const Status& status, int line = __builtin_LINE()) { Expect(status.ok(), status.message(), line); }
void ExpectByte(int got, int want, const std::string& what = "byte", int line = __builtin_LINE()) {
  Expect(got == want, what + ": " + std::to_string(got) + " instead of " + std::to_string(want), line);
}

const Driver* OpenDriver() {
  if (!g_fake_wanted) {
    const Driver* driver = nullptr;
    ExpectOk(Driver::Open(&driver));
    return driver;
  }
  static const std::unique_ptr<FakeDriver> fake = [] {
    std::unique_ptr<FakeDriver> made;
    ExpectOk(FakeDriver::Make({}, &made));
    return made;
  }();
  return &fake->driver();
}

// The first device, with its context current; `grain` is its mapping granularity.
struct World {
  World() : driver(*OpenDriver()) {
    DeviceDescription device;
    ExpectOk(DescribeDevice(driver, 0, &device));
    Expect(device.virtual_memory && device.granularity > 0);
    grain = static_cast<std::size_t>(device.granularity);
    ExpectOk(CudaContext::Make(driver, 0, &context));
    scope = std::make_unique<ContextScope>(*context);
    ExpectOk(scope->status());
  }
  // Returns one byte of device memory.
  int Byte(const void* device) const {
    unsigned char byte = 0;
    const cu::DevicePtr from = reinterpret_cast<cu::DevicePtr>(device);
    Expect(driver.MemcpyDtoHAsync(&byte, from, 1, nullptr) == Result::kSuccess);
    Expect(driver.StreamSynchronize(nullptr) == Result::kSuccess);
    return byte;
  }
  const Driver& driver;
  std::size_t grain = 0;
  std::shared_ptr<CudaContext> context;
  std::unique_ptr<ContextScope> scope;
};

void BlocksAreMappedAliasedAndMoved() {
  World world;
  const std::int64_t block = static_cast<std::int64_t>(world.grain);
  for (const std::int64_t bytes : {block, 2 * block}) {
    std::unique_ptr<CudaVmm> vmm;
    ExpectOk(CudaVmm::Make(world.context, 64 * bytes, bytes, &vmm));
    std::fprintf(stderr, "blocks of %lld bytes, %s\n", static_cast<long long>(bytes),
                 vmm->shareable() ? "shareable" : "not shareable");
    ExpectOk(vmm->Grow(8));
    const std::int32_t blocks[] = {3, 0, 5, 3};
    ExpectOk(vmm->Create(blocks, 3));
    ExpectOk(vmm->Map(0, blocks, 4));
    for (int i = 0; i < 3; ++i) ExpectOk(vmm->Fill(i * bytes, bytes, i + 1));
    ExpectByte(world.Byte(vmm->base() + 3 * bytes), 1, "a block at two addresses");
    ExpectByte(world.Byte(vmm->base() + 3 * bytes - 1), 3);
    // Across blocks, in a single call.
    ExpectOk(vmm->Fill(bytes - 16, 32, 9));
    ExpectByte(world.Byte(vmm->base() + 3 * bytes + bytes - 1), 9);
    ExpectByte(world.Byte(vmm->base() + bytes + 15), 9);
    ExpectOk(vmm->Move(bytes, 40 * bytes, blocks + 1, 2));
    ExpectByte(world.Byte(vmm->base() + 41 * bytes), 3);
    ExpectOk(vmm->Map(bytes, blocks + 2, 1));
    ExpectByte(world.Byte(vmm->base() + bytes), 3, "the place is free again");
    ExpectOk(vmm->Unmap(bytes, blocks + 2, 1));
    ExpectOk(vmm->Unmap(40 * bytes, blocks + 1, 2));
    ExpectOk(vmm->Destroy(blocks + 1, 2));
    Expect(vmm->PhysicalBytes() == bytes);
    // A far larger range than there is memory costs nothing. (Not a fixed number: the fake driver uses addresses of
    // this process, of which ThreadSanitizer may leave as little as half a TiB contiguous.)
    std::size_t free = 0, total = 0;
    Expect(world.driver.MemGetInfo(&free, &total) == Result::kSuccess);
    std::int64_t free_bytes = 0;
    ExpectOk(FreeDeviceBytes(*world.context, &free_bytes));
    Expect(free_bytes > 0 && free_bytes <= static_cast<std::int64_t>(total));
    const std::int64_t far_more = 16 * static_cast<std::int64_t>(total) / bytes * bytes;
    std::unique_ptr<CudaVmm> large;
    ExpectOk(CudaVmm::Make(world.context, far_more, bytes, &large));
  }
}

void TheDriverKeepsTheRulesThatTheFakeOneChecks() {
  World world;
  const Driver& driver = world.driver;
  const std::size_t grain = world.grain;
  cu::AllocationProp prop;
  prop.location.id = world.context->device();
  cu::DevicePtr at = 0;
  Expect(driver.MemAddressReserve(&at, 8 * grain, grain, 0, 0) == Result::kSuccess);
  Expect(at % grain == std::size_t{0});
  cu::MemHandle one = 0, two = 0, odd = 0;
  Expect(driver.MemCreate(&odd, grain + 4096, &prop, 0) != Result::kSuccess);
  Expect(driver.MemCreate(&one, grain, &prop, 0) == Result::kSuccess);
  Expect(driver.MemCreate(&two, 2 * grain, &prop, 0) == Result::kSuccess);
  Expect(driver.MemMap(at, grain, 0, one, 0) == Result::kSuccess);
  Expect(driver.MemMap(at, grain, 0, one, 0) != Result::kSuccess, "over a mapping");
  Expect(driver.MemMap(at + 4096, grain, 0, one, 0) != Result::kSuccess, "off the grid");
  Expect(driver.MemMap(at + grain, 2 * grain, 0, two, 0) == Result::kSuccess);
  Expect(driver.MemUnmap(at + grain, grain) != Result::kSuccess, "a part of a mapping");
  // The real driver accepts this and does nothing (580.159 on an H200). The fake one is stricter: whoever unmaps a hole
  // has lost track of its mappings.
  Expect((driver.MemUnmap(at + 4 * grain, grain) == Result::kSuccess) == !g_fake_wanted, "a hole");
  cu::AccessDesc access;
  access.location.id = world.context->device();
  Expect(driver.MemSetAccess(at, 4 * grain, &access, 1) != Result::kSuccess, "into a hole");
  Expect(driver.MemSetAccess(at, 3 * grain, &access, 1) == Result::kSuccess, "two mappings at once");
  Expect(driver.MemsetD8Async(at, 1, 3 * grain, nullptr) == Result::kSuccess);
  Expect(driver.StreamSynchronize(nullptr) == Result::kSuccess);
  Expect(driver.MemUnmap(at, grain) == Result::kSuccess);
  Expect(driver.MemUnmap(at + grain, 2 * grain) == Result::kSuccess);
  Expect(driver.MemRelease(one) == Result::kSuccess);
  Expect(driver.MemRelease(two) == Result::kSuccess);
  Expect(driver.MemAddressFree(at, 8 * grain) == Result::kSuccess);
}

void DestroyedBlocksAreFree() {
  World world;
  const std::int64_t bytes = static_cast<std::int64_t>(world.grain);
  std::unique_ptr<CudaVmm> vmm;
  ExpectOk(CudaVmm::Make(world.context, 64 * bytes, bytes, &vmm));
  ExpectOk(vmm->Grow(64));
  std::vector<std::int32_t> blocks;
  for (int i = 0; i < 64; ++i) blocks.push_back(i);
  std::size_t before = 0, during = 0, after = 0, total = 0;
  Expect(world.driver.MemGetInfo(&before, &total) == Result::kSuccess);
  ExpectOk(vmm->Create(blocks.data(), 64));
  ExpectOk(vmm->Map(0, blocks.data(), 64));
  Expect(world.driver.MemGetInfo(&during, &total) == Result::kSuccess);
  ExpectOk(vmm->Unmap(0, blocks.data(), 64));
  ExpectOk(vmm->Destroy(blocks.data(), 64));
  Expect(world.driver.MemGetInfo(&after, &total) == Result::kSuccess);
  Expect(during + 64 * world.grain <= before, std::to_string(before) + " " + std::to_string(during));
  Expect(after >= during + 64 * world.grain, std::to_string(during) + " " + std::to_string(after));
}

// What hand-over relies on. Here one process stands in for two, with the memory of two pools.
void HandlesAreSharedReadOnlyAndKeepTheirMemory() {
  World world;
  const std::int64_t bytes = static_cast<std::int64_t>(world.grain);
  std::unique_ptr<CudaVmm> sender, receiver;
  for (std::unique_ptr<CudaVmm>* const vmm : {&sender, &receiver}) {
    ExpectOk(CudaVmm::Make(world.context, 16 * bytes, bytes, vmm));
    ExpectOk((*vmm)->Grow(4));
  }
  const std::int32_t blocks[] = {0, 1};
  const std::int64_t offsets[] = {0, bytes};
  std::shared_ptr<MemoryFile> file;
  ExpectOk(MemoryFile::Make(4096, &file));
  if (const Status status = sender->Lend(file, blocks, offsets, 2); !status.ok()) {
    std::fprintf(stderr, "not shareable here: %s\n", status.message().c_str());
    return;
  }
  std::string name;
  ExpectOk(sender->MemoryName(&name));
  std::fprintf(stderr, "%s\n", name.c_str());
  ExpectOk(sender->Map(0, blocks, 2));
  for (int i = 0; i < 2; ++i) ExpectOk(sender->Fill(i * bytes, bytes, 5 + i));
  std::vector<Fd> sent, copies;
  ExpectOk(sender->ExportCopies({{1, nullptr}}, bytes - 16, &copies));
  ExpectOk(sender->Export(blocks, 2, &sent));
  ExpectOk(sender->Seal(file));
  ExpectByte(world.Byte(sender->base()), 5, "sealed");
  ExpectOk(
      receiver->Import({sent[0].get(), sent[1].get(), copies[0].get()}, std::vector<std::int32_t>{2, 0, 1}.data()));
  const std::int32_t received[] = {2, 0, 1};
  ExpectOk(receiver->MapReadOnly(4 * bytes, received, 3));
  const char* const there = receiver->base() + 4 * bytes;
  const auto look = [&] {
    ExpectByte(world.Byte(there), 5, "received");
    ExpectByte(world.Byte(there + 2 * bytes - 1), 6, "received");
    ExpectByte(world.Byte(there + 3 * bytes - 17), 6, "a copy");
    ExpectByte(world.Byte(there + 3 * bytes - 1), 0, "behind its payload");
  };
  look();
  std::size_t before = 0, after = 0, total = 0;
  Expect(world.driver.MemGetInfo(&before, &total) == Result::kSuccess);
  sender.reset();
  sent.clear();
  copies.clear();
  look();
  Expect(world.driver.MemGetInfo(&after, &total) == Result::kSuccess);
  Expect(after < before + world.grain, "the receiver keeps the memory");
  ExpectOk(receiver->Create(std::vector<std::int32_t>{3}.data(), 1));
  receiver.reset();
  Expect(world.driver.MemGetInfo(&after, &total) == Result::kSuccess);
  Expect(after >= before + 2 * world.grain, "and gives it back");
  // An allocation that was not created as shareable.
  cu::AllocationProp prop;
  prop.location.id = world.context->device();
  cu::MemHandle plain = 0;
  int fd = -1;
  Expect(world.driver.MemCreate(&plain, world.grain, &prop, 0) == Result::kSuccess);
  Expect(world.driver.MemExportToShareableHandle(&fd, plain, cu::HandleType::kPosixFileDescriptor, 0) !=
         Result::kSuccess);
  Expect(world.driver.MemRelease(plain) == Result::kSuccess);
}

void RunningOutIsAStatus() {
  World world;
  const std::int64_t bytes = static_cast<std::int64_t>(world.grain);
  std::size_t free = 0, total = 0;
  Expect(world.driver.MemGetInfo(&free, &total) == Result::kSuccess);
  // One more handle than there is memory for.
  const std::int64_t huge = static_cast<std::int64_t>(total / world.grain + 1) * bytes;
  std::unique_ptr<CudaVmm> vmm;
  ExpectOk(CudaVmm::Make(world.context, huge, huge, &vmm));
  ExpectOk(vmm->Grow(1));
  const std::int32_t block = 0;
  const Status status = vmm->Create(&block, 1);
  Expect(status.code() == Code::kResourceExhausted, status.message());
  std::fprintf(stderr, "%s\n", status.message().c_str());
  Expect(vmm->PhysicalBytes() == 0);
}

int RunAll() {
  struct Case {
    const char* name;
    void (*run)();
  };
  const Case cases[] = {
      {"blocks are mapped, aliased, moved and keep their bytes", &BlocksAreMappedAliasedAndMoved},
      {"the driver keeps the rules that the fake one checks", &TheDriverKeepsTheRulesThatTheFakeOneChecks},
      {"destroyed blocks are free", &DestroyedBlocksAreFree},
      {"handles are shared, read only, and keep their memory", &HandlesAreSharedReadOnlyAndKeepTheirMemory},
      {"running out is a status", &RunningOutIsAStatus}};
  for (const Case& test : cases) {
    const int before = g_failures;
    test.run();
    std::fprintf(stderr, "%s %s\n", g_failures == before ? "[ ok ]" : "[FAIL]", test.name);
  }
  return g_failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace kvpage

int main(int argc, char** argv) {
  kvpage::g_fake_wanted = argc > 1 && std::strcmp(argv[1], "--fake") == 0;
  if (!kvpage::g_fake_wanted) {
    const kvpage::Driver* driver = nullptr;
    if (const kvpage::Status status = kvpage::Driver::Open(&driver); !status.ok()) {
      std::fprintf(stderr, "%s\n(--fake asks the fake driver instead)\n", status.message().c_str());
      return 1;
    }
  }
  return kvpage::RunAll();
}
