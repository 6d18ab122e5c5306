// Fiber: a separate stack that can be switched to and from. There is one for each thread of an emulated block.
#ifndef KVPAGE_TESTING_CUDA_EMULATION_FIBER_H_
#define KVPAGE_TESTING_CUDA_EMULATION_FIBER_H_

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace kvpage::emulation {

class Fiber {
 public:
  static constexpr std::size_t kStackBytes = 256 << 10;  // most pages are never touched

  // Represents the calling thread's own stack, to which other fibers switch back.
  Fiber();
  // Creates a fiber. `entry` runs at the first switch to it and must never return.
  Fiber(void (*entry)(void*), void* argument);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Abandons what the fiber was running: the next switch to it starts `entry` again. Not for the running fiber.
  void Reset();

  // Suspends `from`, which must be running, and runs this fiber; returns at the next switch to `from`.
  void SwitchFrom(Fiber* from);

  // Called by the function in which a new stack starts.
  void Enter();

 private:
  void Arrive();
  void Prepare();

  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  char* memory_ = nullptr;  // the stack with a guard page below; null for a thread's own
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  void* fake_stack_ = nullptr;  // used by AddressSanitizer
  const void* bottom_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace kvpage::emulation

#endif  // KVPAGE_TESTING_CUDA_EMULATION_FIBER_H_
