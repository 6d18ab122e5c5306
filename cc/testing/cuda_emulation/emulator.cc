#include "testing/cuda_emulation/emulator.h"

#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "testing/cuda_emulation/block.h"
#include "testing/cuda_emulation/cuda_runtime.h"

namespace kvpage::emulation {
namespace {

// While it lives an access to memory that does not exist ends the process with the message for early kernels.
class FaultTrap {
 public:
  FaultTrap() {
    struct sigaction action = {};
    action.sa_handler = [](int) {
      Fail("the kernel accesses global memory before it waits for the prior kernel, which it may overlap");
    };
    sigaction(SIGSEGV, &action, &segmentation_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~FaultTrap() {
    sigaction(SIGSEGV, &segmentation_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
  }
  FaultTrap(const FaultTrap&) = delete;
  FaultTrap& operator=(const FaultTrap&) = delete;

 private:
  struct sigaction segmentation_ = {}, bus_ = {};
};

struct Range {
  void* p;
  std::size_t bytes;
};
std::vector<Range>& SharedRanges() {
  static auto* const ranges = new std::vector<Range>;
  return *ranges;
}

std::int64_t launches = 0;

void ThreadMain(void* argument) {
  auto* const self = static_cast<Thread*>(argument);
  for (;;) {
    (*block().body)();
    CommitCopies();
    WaitForCopies(0);
    self->state = State::kDone;
    block().progress = true;
    Park();
  }
}

void Resume(Thread* thread, const Index3& dim) {
  const auto i = static_cast<unsigned>(thread->index);
  threadIdx = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
  block().running = thread;
  thread->fiber->SwitchFrom(block().scheduler.get());
  block().running = nullptr;
}

// Runs a block to its end; with Block::early until none of its threads can go on without the prior kernel.
void RunBlock(const Index3& dim, std::size_t shared_bytes, std::mt19937_64* random) {
  Block& b = block();
  for (const Range& range : SharedRanges()) std::memset(range.p, 0xff, range.bytes);
  if (shared_bytes > 0) std::memset(b.dynamic_shared, 0xff, shared_bytes);
  for (Barrier& barrier : b.barriers) barrier = {};
  for (int i = 0; i < b.size; ++i) b.threads[i]->state = State::kReady;
  const int warps = (b.size + kWarp - 1) / kWarp;
  std::vector<int> warp_order(warps), lane_order(kWarp);
  std::iota(warp_order.begin(), warp_order.end(), 0);
  std::iota(lane_order.begin(), lane_order.end(), 0);
  for (int idle = 0;;) {
    bool ran = false, left = false;
    b.progress = false;
    if (random != nullptr) std::shuffle(warp_order.begin(), warp_order.end(), *random);
    for (const int warp : warp_order) {
      if (random != nullptr) std::shuffle(lane_order.begin(), lane_order.end(), *random);
      for (const int lane : lane_order) {
        const int i = warp * kWarp + lane;
        if (i >= b.size) continue;
        Thread* const thread = b.threads[i].get();
        if (thread->state == State::kReady) {
          Resume(thread, dim);
          ran = true;
        }
        left |= thread->state != State::kDone;
      }
    }
    if (!left) return;
    idle = b.progress ? 0 : idle + 1;
    if (!ran && b.early) return;
    if (!ran || idle > kIdleRounds) FailStuck();
  }
}

// Runs what a block of an overlapped kernel does before it waits: on a card that may be before the prior kernel has
// done anything. What it leaves is in shared memory only, which the block's real start fills with NaN again.
void RunEarly(const KernelLaunch& launch, std::mt19937_64* random) {
  Block& b = block();
  b.body = &launch.early;
  b.early = true;
  {
    const FaultTrap trap;
    RunBlock(launch.block, launch.shared_bytes, random);
  }
  b.early = false;
  for (int i = 0; i < b.size; ++i) {
    Thread& thread = *b.threads[i];
    if (thread.state != State::kDone) thread.fiber->Reset();
    thread.state = State::kDone;
    thread.groups.clear();
    thread.open.clear();
  }
}

}  // namespace

Block& block() {
  static Block* const block = new Block;  // fibers live as long as the process
  return *block;
}

Device& device() {
  static Device device = [] {
    Device initial;
    if (const char* version = std::getenv("KVPAGE_EMULATED_CODE")) initial.code_version = std::atoi(version);
    return initial;
  }();
  return device;
}

std::int64_t NumLaunches() { return launches; }

void Run(const KernelLaunch& launch) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  ++launches;
  const Index3 &grid = launch.grid, &dim = launch.block;
  Block& b = block();
  b.size = static_cast<int>(dim.x * dim.y * dim.z);
  b.scheduler = std::make_unique<Fiber>();
  b.shared_variables.clear();
  b.shared_variables_bytes = 0;
  for (auto i = static_cast<int>(b.threads.size()); i < b.size; ++i) {
    b.threads.push_back(std::make_unique<Thread>());
    b.threads.back()->index = i;
    b.threads.back()->fiber = std::make_unique<Fiber>(&ThreadMain, b.threads.back().get());
  }
  // Exactly as large as asked for, so that AddressSanitizer sees what lies past its end.
  void* shared = nullptr;
  if (launch.shared_bytes > 0 && posix_memalign(&shared, 1024, launch.shared_bytes) != 0) {
    Fail("no memory for shared memory");
  }
  b.dynamic_shared = static_cast<unsigned char*>(shared);
  blockDim = {dim.x, dim.y, dim.z};
  gridDim = {grid.x, grid.y, grid.z};
  std::mt19937_64 random(device().seed + static_cast<std::uint64_t>(launches));
  std::mt19937_64* const shuffle = device().seed != 0 ? &random : nullptr;
  std::vector<std::uint64_t> order(std::uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  if (shuffle != nullptr) std::shuffle(order.begin(), order.end(), random);
  const auto enter = [&](std::uint64_t i) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
  };
  if (launch.overlap) {
    enter(order[0]);
    RunEarly(launch, shuffle);
  }
  b.body = &launch.body;
  for (const std::uint64_t i : order) {
    enter(i);
    RunBlock(dim, launch.shared_bytes, shuffle);
  }
  std::free(shared);
  b.dynamic_shared = nullptr;
}

void WaitForPriorKernel() {
  if (device().code_version < 90 || !block().early) return;
  block().running->state = State::kPrior;
  Park();  // for the last time
}

int LinearThread() { return block().running->index; }
int Lane() { return block().running->index % kWarp; }
unsigned char* DynamicShared() {
  if (block().dynamic_shared == nullptr) Fail("the kernel uses dynamic shared memory, it was launched with 0 bytes");
  return block().dynamic_shared;
}

void UseShared(const void* p, std::size_t bytes) {
  std::vector<const void*>& used = block().shared_variables;
  if (std::find(used.begin(), used.end(), p) != used.end()) return;
  used.push_back(p);
  block().shared_variables_bytes += bytes;
  if (block().shared_variables_bytes > kStaticSharedBytes) {
    Fail("the kernel has more static shared memory than kStaticSharedBytes");
  }
}

void RegisterShared(void* p, std::size_t bytes) {
  std::memset(p, 0xff, bytes);
  SharedRanges().push_back({p, bytes});
}

void Fail(const char* message) {
  std::fprintf(stderr, "emulated CUDA: block (%u, %u, %u), thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               block().running != nullptr ? block().running->index : -1, message);
  std::abort();
}

}  // namespace kvpage::emulation
