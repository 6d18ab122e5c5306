#include "testing/cuda_emulation/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on the current stack and its stack pointer at *from, then restores the registers
// from the stack `to`. An order of magnitude faster than swapcontext, which makes system calls.
extern "C" void kvpage_emulation_switch(void** from, void* to);
asm(R"(
.text
.globl kvpage_emulation_switch
.type kvpage_emulation_switch, @function
kvpage_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kvpage_emulation_switch, .-kvpage_emulation_switch
)");
#endif

namespace kvpage::emulation {
namespace {

std::size_t GuardBytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

Fiber* starting = nullptr;
Fiber* leaving = nullptr;

__attribute__((no_sanitize_address)) void Start() {
  starting->Enter();
  std::abort();  // entry never returns
}

}  // namespace

Fiber::Fiber() = default;

Fiber::Fiber(void (*entry)(void*), void* argument) : entry_(entry), argument_(argument) {
  const std::size_t page = GuardBytes();
  void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("emulated CUDA: no memory for a thread's stack");
    std::abort();
  }
  memory_ = static_cast<char*>(memory);
  bottom_ = memory_ + page;
  size_ = kStackBytes;
  Prepare();
}

// Sets up the stack for the first switch to it.
void Fiber::Prepare() {
#if defined(__x86_64__)
  // As if Start were about to be returned to: at its first instruction, the stack pointer is 8 below a multiple of 16.
  auto* top = reinterpret_cast<void**>(memory_ + GuardBytes() + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Start);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = static_cast<void*>(top);
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = memory_ + GuardBytes();
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, &Start, 0);
#endif
}

void Fiber::Reset() {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(bottom_, size_);  // the frames that were abandoned
  fake_stack_ = nullptr;
#endif
  Prepare();
}

Fiber::~Fiber() {
  if (memory_ == nullptr) return;
  munmap(memory_, kStackBytes + GuardBytes());
}

void Fiber::Arrive() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
  if (leaving->memory_ == nullptr) {
    leaving->bottom_ = bottom;
    leaving->size_ = size;
  }
#endif
}

void Fiber::Enter() {
  Arrive();
  entry_(argument_);
}

void Fiber::SwitchFrom(Fiber* from) {
  starting = this;
  leaving = from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from->fake_stack_, bottom_, size_);
#endif
#if defined(__x86_64__)
  kvpage_emulation_switch(&from->stack_pointer_, stack_pointer_);
#else
  swapcontext(&from->context_, &context_);
#endif
  from->Arrive();
}

}  // namespace kvpage::emulation
