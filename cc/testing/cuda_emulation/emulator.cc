#include "testing/cuda_emulation/emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "testing/cuda_emulation/cuda_runtime.h"
#include "testing/cuda_emulation/fiber.h"

namespace kvpage::emulation {
namespace {

constexpr int kWarp = 32;
constexpr int kBarriers = 16;
constexpr int kIdleRounds = 100000;  // of yielding only, after which nothing will happen any more

enum class State { kDone, kReady, kBarrier, kWarp };

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  int index = 0;
  State state = State::kDone;
  Site site;
  int barrier = 0;
  unsigned mask = 0;
  void* argument = nullptr;
  std::vector<std::vector<Copy>> groups;  // committed copies
  std::vector<Copy> open;
};

struct Barrier {
  int arrived = 0, predicates = 0, result = 0;
};

// The block that runs. One at a time: the launch mutex is held.
struct Block {
  std::vector<std::unique_ptr<Thread>> threads;  // of the largest block so far
  int size = 0;
  Thread* running = nullptr;
  std::unique_ptr<Fiber> scheduler;
  const std::function<void()>* body = nullptr;
  Barrier barriers[kBarriers];
  unsigned char* dynamic_shared = nullptr;
  bool progress = false;
};

Block& block() {
  static Block* const block = new Block;  // fibers live as long as the process
  return *block;
}

struct Range {
  void* p;
  std::size_t bytes;
};
std::vector<Range>& SharedRanges() {
  static auto* const ranges = new std::vector<Range>;
  return *ranges;
}

std::int64_t launches = 0;

std::string Describe(const Site& site) {
  return std::string(site.what) + " (" + site.file + ":" + std::to_string(site.line) + ")";
}

// Nobody can run: says who waits where.
[[noreturn]] void FailStuck() {
  std::map<std::string, std::string> places;
  for (int i = 0; i < block().size; ++i) {
    const Thread& thread = *block().threads[i];
    std::string place = "returned";
    if (thread.state == State::kReady) place = "polls in " + Describe(thread.site);
    if (thread.state == State::kBarrier) place = "waits in " + Describe(thread.site);
    if (thread.state == State::kWarp) {
      char mask[32];
      std::snprintf(mask, sizeof(mask), ", mask %08x", thread.mask);
      place = "waits in " + Describe(thread.site) + mask;
    }
    places[place] += " " + std::to_string(i);
  }
  std::string text = "threads wait for each other in vain:";
  for (const auto& [place, threads] : places) text += "\n  " + place + ": threads" + threads;
  Fail(text.c_str());
}

void Park() {  // until the scheduler comes back to this thread
  Thread* const self = block().running;
  block().scheduler->SwitchFrom(self->fiber.get());
}

void Finish(std::vector<Copy>* copies) {
  for (const Copy& copy : *copies) {
    std::memcpy(copy.to, copy.from, copy.valid);
    std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
  }
  copies->clear();
}

void ThreadMain(void* argument) {
  auto* const self = static_cast<Thread*>(argument);
  for (;;) {
    (*block().body)();
    WaitForCopies(0);
    Finish(&self->open);
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
    if (!ran || idle > kIdleRounds) FailStuck();
  }
}

}  // namespace

Device& device() {
  static Device device;
  return device;
}

std::int64_t NumLaunches() { return launches; }

void Launch(Index3 grid, Index3 dim, std::size_t shared_bytes, const std::function<void()>& body) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  ++launches;
  Block& b = block();
  b.body = &body;
  b.size = static_cast<int>(dim.x * dim.y * dim.z);
  b.scheduler = std::make_unique<Fiber>();
  for (auto i = static_cast<int>(b.threads.size()); i < b.size; ++i) {
    b.threads.push_back(std::make_unique<Thread>());
    b.threads.back()->index = i;
    b.threads.back()->fiber = std::make_unique<Fiber>(&ThreadMain, b.threads.back().get());
  }
  // Exactly as large as asked for, so that AddressSanitizer sees what lies past its end.
  void* shared = nullptr;
  if (shared_bytes > 0 && posix_memalign(&shared, 1024, shared_bytes) != 0) Fail("no memory for shared memory");
  b.dynamic_shared = static_cast<unsigned char*>(shared);
  blockDim = {dim.x, dim.y, dim.z};
  gridDim = {grid.x, grid.y, grid.z};
  std::mt19937_64 random(device().seed + static_cast<std::uint64_t>(launches));
  std::mt19937_64* const shuffle = device().seed != 0 ? &random : nullptr;
  std::vector<std::uint64_t> order(std::uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  if (shuffle != nullptr) std::shuffle(order.begin(), order.end(), random);
  for (const std::uint64_t i : order) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    RunBlock(dim, shared_bytes, shuffle);
  }
  std::free(shared);
  b.dynamic_shared = nullptr;
}

int LinearThread() { return block().running->index; }
int Lane() { return block().running->index % kWarp; }
unsigned char* DynamicShared() {
  if (block().dynamic_shared == nullptr) Fail("the kernel uses dynamic shared memory, it was launched with 0 bytes");
  return block().dynamic_shared;
}

void RegisterShared(void* p, std::size_t bytes) {
  std::memset(p, 0xff, bytes);
  SharedRanges().push_back({p, bytes});
}

int SyncBlock(int id, int count, bool predicate, const Site& site) {
  if (id < 0 || id >= kBarriers) Fail("barriers are 0..15");
  Block& b = block();
  Barrier& barrier = b.barriers[id];
  Thread* const self = b.running;
  self->state = State::kBarrier;
  self->barrier = id;
  self->site = site;
  ++barrier.arrived;
  barrier.predicates += predicate;
  if (barrier.arrived == (count < 0 ? b.size : count)) {
    for (int i = 0; i < b.size; ++i) {
      Thread& thread = *b.threads[i];
      if (thread.state != State::kBarrier || thread.barrier != id) continue;
      if (count < 0 && (thread.site.line != site.line || std::strcmp(thread.site.file, site.file) != 0)) FailStuck();
      thread.state = State::kReady;
    }
    barrier.result = barrier.predicates;
    barrier.arrived = barrier.predicates = 0;
    b.progress = true;
    return barrier.result;  // nobody has passed the next one before all have left this one
  }
  Park();
  return barrier.result;
}

void WarpCollective(unsigned mask, const Site& site, void* arg, CollectiveFn run) {
  Block& b = block();
  Thread* const self = b.running;
  const int first = self->index / kWarp * kWarp;
  if ((mask >> (self->index - first) & 1) == 0) {
    Fail((Describe(site) + ": the calling lane is not in the mask").c_str());
  }
  self->state = State::kWarp;
  self->mask = mask;
  self->site = site;
  self->argument = arg;
  void* args[kWarp] = {};
  bool complete = true;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    if (first + lane >= b.size || b.threads[first + lane]->state == State::kDone) {
      Fail((Describe(site) + ": lane " + std::to_string(lane) + " is in the mask, but has returned or does not exist")
               .c_str());
    }
    const Thread& other = *b.threads[first + lane];
    // It may wait for others first, but not for this lane in another call.
    if (other.state != State::kWarp || (other.mask >> (self->index - first) & 1) == 0) {
      complete = false;
      continue;
    }
    if (other.mask != mask || std::strcmp(other.site.what, site.what) != 0) FailStuck();
    args[lane] = other.argument;
  }
  if (!complete) {
    Park();
    return;
  }
  run(args, mask);
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) != 0) b.threads[first + lane]->state = State::kReady;
  }
  b.progress = true;
}

void Yield(const Site& site) {
  block().running->site = site;
  Park();
}

void CopyAsync(void* to, const void* from, int bytes, int valid) {
  std::memset(to, 0xff, bytes);
  block().running->open.push_back({to, from, bytes, valid});
}

void CommitCopies() {
  Thread& self = *block().running;
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void WaitForCopies(int groups_left) {
  Thread& self = *block().running;
  const auto done = std::max<std::int64_t>(static_cast<std::int64_t>(self.groups.size()) - groups_left, 0);
  for (std::int64_t i = 0; i < done; ++i) Finish(&self.groups[i]);
  self.groups.erase(self.groups.begin(), self.groups.begin() + done);
}

void Fail(const char* message) {
  std::fprintf(stderr, "emulated CUDA: block (%u, %u, %u), thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               block().running != nullptr ? block().running->index : -1, message);
  std::abort();
}

}  // namespace kvpage::emulation
