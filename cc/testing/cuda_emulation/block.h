// The block that the emulated device runs: its threads, and where they wait. Shared by the scheduler (emulator.cc) and
// by what threads call to wait for each other (collectives.cc).
#ifndef KVPAGE_TESTING_CUDA_EMULATION_BLOCK_H_
#define KVPAGE_TESTING_CUDA_EMULATION_BLOCK_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "testing/cuda_emulation/emulator.h"
#include "testing/cuda_emulation/fiber.h"

namespace kvpage::emulation {

inline constexpr int kWarp = 32;
inline constexpr int kBarriers = 16;
inline constexpr int kIdleRounds = 100000;  // of yielding only, after which nothing will happen any more

enum class State { kDone, kReady, kBarrier, kWarp, kPrior };  // kPrior: waits for the prior kernel

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

struct Block {
  const KernelLaunch* launch = nullptr;
  Index3 index;                                  // blockIdx
  std::vector<std::unique_ptr<Thread>> threads;  // of the largest block so far
  int size = 0;
  Thread* running = nullptr;
  Fiber* scheduler = nullptr;
  const std::function<void()>* body = nullptr;
  Barrier barriers[kBarriers];
  unsigned char* dynamic_shared = nullptr;
  bool progress = false;
  int idle = 0;                               // rounds without progress
  bool early = false;                         // the prior kernel has not ended
  std::vector<unsigned char> shared_copy;     // its static shared memory, while another block runs
  std::vector<const void*> shared_variables;  // that it has used
  std::size_t shared_variables_bytes = 0;
};

// The block that runs, or null. One at a time: the launch mutex is held.
Block* RunningBlock();
inline Block& block() { return *RunningBlock(); }

// The static shared memory of the block that runs. Its variables are those of all blocks, so another block's values are
// copied in.
void SaveShared(std::vector<unsigned char>* bytes);
void RestoreShared(const std::vector<unsigned char>& bytes);

// Leaves the running thread until the scheduler comes back to it.
void Park();

// Ends the process with a message that says who waits where.
[[noreturn]] void FailStuck(const char* why = "deadlock: all threads wait for each other");

}  // namespace kvpage::emulation

#endif  // KVPAGE_TESTING_CUDA_EMULATION_BLOCK_H_
