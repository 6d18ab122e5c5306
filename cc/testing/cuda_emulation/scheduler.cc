// Runs launches: decides which blocks are resident, and in which order their threads continue.
#include <signal.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "testing/cuda_emulation/block.h"
#include "testing/cuda_emulation/cuda_runtime.h"
#include "testing/cuda_emulation/watchdog.h"

namespace kvpage::emulation {
namespace {

constexpr std::size_t kResident = 3;  // blocks that take turns if there is a seed

// While it exists, an access to unmapped memory ends the process with the message for early kernels.
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

std::int64_t launches = 0;
Block* current = nullptr;

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

Index3 At(std::uint64_t i, const Index3& size) {
  return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
          static_cast<unsigned>(i / size.x / size.y)};
}

// Makes `b` the running block.
void Enter(Block* b) {
  if (current == b) return;
  if (current != nullptr) SaveShared(&current->shared_copy);
  current = b;
  RestoreShared(b->shared_copy);
  const Index3 &grid = b->launch->grid, &dim = b->launch->block;
  blockDim = {dim.x, dim.y, dim.z};
  gridDim = {grid.x, grid.y, grid.z};
  blockIdx = {b->index.x, b->index.y, b->index.z};
}

class Scheduler {
 public:
  explicit Scheduler(std::uint64_t seed) : random_(seed), shuffles_(device().seed != 0) {}

  void Run(const std::vector<const KernelLaunch*>& together) {
    struct Waiting {
      const KernelLaunch* launch;
      std::uint64_t block;
    };
    std::vector<Waiting> waiting;
    for (const KernelLaunch* launch : together) {
      const std::uint64_t blocks = std::uint64_t{launch->grid.x} * launch->grid.y * launch->grid.z;
      for (std::uint64_t i = 0; i < blocks; ++i) waiting.push_back({launch, i});
    }
    std::stable_sort(waiting.begin(), waiting.end(),
                     [](const Waiting& a, const Waiting& b) { return a.block < b.block; });
    if (shuffles_) std::shuffle(waiting.begin(), waiting.end(), random_);
    for (const KernelLaunch* launch : together) {
      if (launch->overlap) RunEarly(*launch);
    }
    const std::size_t limit = shuffles_ ? std::max(kResident, together.size()) : together.size();
    std::vector<Block*> resident;
    for (std::size_t next = 0, turn = 0; next < waiting.size() || !resident.empty(); ++turn) {
      while (resident.size() < limit && next < waiting.size()) {
        resident.push_back(Start(*waiting[next].launch, waiting[next].block));
        ++next;
      }
      const std::size_t i = (shuffles_ ? random_() : turn) % resident.size();
      if (!Round(resident[i])) continue;
      End(resident[i]);
      resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }

 private:
  Block* Start(const KernelLaunch& launch, std::uint64_t index) {
    std::vector<Block*>& spare = Spare();
    if (spare.empty()) spare.push_back(new Block);  // fibers live as long as the process
    Block* const b = spare.back();
    spare.pop_back();
    b->launch = &launch;
    b->body = &launch.body;
    b->index = At(index, launch.grid);
    b->size = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
    b->scheduler = &fiber_;
    b->idle = 0;
    b->shared_copy.clear();  // so all of it is NaN
    b->shared_variables.clear();
    b->shared_variables_bytes = 0;
    for (auto i = static_cast<int>(b->threads.size()); i < b->size; ++i) {
      b->threads.push_back(std::make_unique<Thread>());
      b->threads.back()->index = i;
      b->threads.back()->fiber = std::make_unique<Fiber>(&ThreadMain, b->threads.back().get());
    }
    for (int i = 0; i < b->size; ++i) b->threads[i]->state = State::kReady;
    for (Barrier& barrier : b->barriers) barrier = {};
    if (launch.shared_bytes == 0) return b;
    // Exactly the requested size, so that AddressSanitizer detects accesses past the end.
    void* shared = nullptr;
    if (posix_memalign(&shared, 1024, launch.shared_bytes) != 0) Fail("no memory for shared memory");
    std::memset(shared, 0xff, launch.shared_bytes);
    b->dynamic_shared = static_cast<unsigned char*>(shared);
    return b;
  }

  void End(Block* b) {
    std::free(b->dynamic_shared);
    b->dynamic_shared = nullptr;
    if (current == b) current = nullptr;
    Spare().push_back(b);
  }

  // Runs each thread of the block until it has to wait. Returns true if the block has ended or, with Block::early, if
  // none of its threads can continue without the prior kernel.
  bool Round(Block* b) {
    Enter(b);
    std::vector<int> warps((b->size + kWarp - 1) / kWarp), lanes(kWarp);
    std::iota(warps.begin(), warps.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);
    bool ran = false, left = false;
    b->progress = false;
    if (shuffles_) std::shuffle(warps.begin(), warps.end(), random_);
    for (const int warp : warps) {
      if (shuffles_) std::shuffle(lanes.begin(), lanes.end(), random_);
      for (const int lane : lanes) {
        const int i = warp * kWarp + lane;
        if (i >= b->size) continue;
        Thread* const thread = b->threads[i].get();
        if (thread->state == State::kReady) {
          Resume(b, thread);
          ran = true;
        }
        left |= thread->state != State::kDone;
      }
    }
    if (!left) return true;
    b->idle = b->progress ? 0 : b->idle + 1;
    if (!ran && b->early) return true;
    if (!ran || b->idle > kIdleRounds) FailStuck();
    watchdog_.Look();
    return false;
  }

  void Resume(Block* b, Thread* thread) {
    const Index3 at = At(static_cast<std::uint64_t>(thread->index), b->launch->block);
    threadIdx = {at.x, at.y, at.z};
    b->running = thread;
    thread->fiber->SwitchFrom(&fiber_);
    b->running = nullptr;
  }

  // Runs the part of an overlapped kernel's block before the wait: on a GPU, this may happen before the prior kernel
  // has done anything. Its only possible effects are in shared memory, which is discarded.
  void RunEarly(const KernelLaunch& launch) {
    Block* const b = Start(launch, 0);
    b->body = &launch.early;
    b->early = true;
    {
      const FaultTrap trap;
      while (!Round(b)) {
      }
    }
    b->early = false;
    for (int i = 0; i < b->size; ++i) {
      Thread& thread = *b->threads[i];
      if (thread.state != State::kDone) thread.fiber->Reset();
      thread.state = State::kDone;
      thread.groups.clear();
      thread.open.clear();
    }
    End(b);
  }

  static std::vector<Block*>& Spare() {
    static auto* const blocks = new std::vector<Block*>;
    return *blocks;
  }

  std::mt19937_64 random_;
  const bool shuffles_;
  const Watchdog watchdog_{device().launch_seconds};
  Fiber fiber_;  // of the calling thread
};

}  // namespace

Block* RunningBlock() { return current; }

std::int64_t NumLaunches() { return launches; }

void Run(const std::vector<const KernelLaunch*>& together) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  launches += static_cast<std::int64_t>(together.size());
  Scheduler(device().seed + static_cast<std::uint64_t>(launches)).Run(together);
}

}  // namespace kvpage::emulation
