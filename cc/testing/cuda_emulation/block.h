// The block that the emulated device runs: its threads, and what they wait for. Shared by the scheduler (scheduler.cc)
// and the functions that threads call to wait for each other (collectives.cc).
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
inline constexpr int kIdleRounds = 100000;  // rounds of nothing but yields, after which the block counts as stuck

enum class State { kDone, kReady, kBarrier, kWarp, kPrior };  // kPrior: waiting for the prior kernel

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
  std::vector<std::unique_ptr<Thread>> threads;  // as many as the largest block so far had
  int size = 0;
  Thread* running = nullptr;
  Fiber* scheduler = nullptr;
  const std::function<void()>* body = nullptr;
  Barrier barriers[kBarriers];
  unsigned char* dynamic_shared = nullptr;
  bool progress = false;
  int idle = 0;                               // rounds without progress
  bool early = false;                         // the prior kernel has not ended yet
  std::vector<unsigned char> shared_copy;     // the block's static shared memory while another block runs
  std::vector<const void*> shared_variables;  // static shared variables that the block has used
  std::size_t shared_variables_bytes = 0;
};

// The running block, or null. There is only one: the launch mutex is held.
Block* RunningBlock();
inline Block& block() { return *RunningBlock(); }

// Save and restore the static shared memory of the running block. All blocks use the same variables, so their values
// are swapped when another block runs.
void SaveShared(std::vector<unsigned char>* bytes);
void RestoreShared(const std::vector<unsigned char>& bytes);

// Leaves the running thread until the scheduler returns to it.
void Park();

// Ends the process with a message that says which thread waits where.
[[noreturn]] void FailStuck(const char* why = "deadlock: all threads wait for each other");

}  // namespace kvpage::emulation

#endif  // KVPAGE_TESTING_CUDA_EMULATION_BLOCK_H_
