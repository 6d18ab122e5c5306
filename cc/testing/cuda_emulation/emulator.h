// The emulated device: runs kernels that were compiled as C++ on the calling thread, each of a block's threads as a
// fiber that runs until it has to wait for others.
//
// It shows mistakes rather than speed. Shared memory is NaN when a block starts. Threads that wait for each other in
// vain, collective calls whose masks or places differ, and threads that return while others wait for them end the
// process with a message. With a seed, blocks, warps and lanes run in a random order and blocks take turns, so that
// what lacks a barrier gives other results. Asynchronous copies arrive when they are waited for and not before. Global
// memory is the heap, whose bounds AddressSanitizer checks. Kernels that may overlap their predecessor are run twice:
// first up to their wait with parameters whose pointers fault, because nothing in global memory may be touched there.
#ifndef KVPAGE_TESTING_CUDA_EMULATION_EMULATOR_H_
#define KVPAGE_TESTING_CUDA_EMULATION_EMULATOR_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace kvpage::emulation {

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
};

// Where a thread waits: shown in messages, and compared where all must wait at one place.
struct Site {
  const char* what = "";
  const char* file = "";
  int line = 0;
};

// ---- what tests set ----
struct Device {
  int num_sms = 4;
  // Static and dynamic, with the attribute set; 48 KiB without. Not to be changed once a kernel has run:
  // KVPAGE_EMULATED_SHARED_KIB sets it from the start.
  int shared_bytes_per_block = 227 << 10;
  int major = 9, minor = 0;
  // The architecture that the kernels' code was compiled for. Below 90 it has no instruction that waits for the prior
  // kernel, as in code that the driver compiles from older PTX for a newer card. KVPAGE_EMULATED_CODE sets it.
  int code_version = 90;
  std::uint64_t seed = 0;  // 0: ascending order
  // Processor time that kernels launched together may take. They take milliseconds, with sanitizers a second.
  double launch_seconds = 60;
};
Device& device();

// Kernels launched so far.
std::int64_t NumLaunches();

// Accesses to shared memory by ldmatrix that had to be repeated, because rows lie in the same banks.
std::int64_t NumBankConflicts();

// Static shared memory that is counted for every kernel, used or not: variables padded to the alignment of the dynamic
// shared memory. A kernel that uses more ends the process.
inline constexpr int kStaticSharedBytes = 1024;

// ---- for the launches (kernels.cc) ----
struct KernelLaunch {
  const void* kernel = nullptr;
  Index3 grid, block;
  std::size_t shared_bytes = 0;
  bool overlap = false;
  std::function<void()> body;   // of one thread
  std::function<void()> early;  // the same with parameters whose pointers fault; called with `overlap` only
};
// Runs launches at the same time: their blocks take turns.
void Run(const std::vector<const KernelLaunch*>& together);

// ---- for device code ----
// Where an overlapped kernel waits for the one before it.
void WaitForPriorKernel();

int Lane();
int LinearThread();
unsigned char* DynamicShared();

// Registers [p, p + bytes) as shared memory: filled with NaN at the start of every block.
void RegisterShared(void* p, std::size_t bytes);

// Counts `bytes` at p as static shared memory of the kernel that runs.
void UseShared(const void* p, std::size_t bytes);

// A __shared__ variable of a kernel.
template <class T>
class Shared {
 public:
  Shared() { RegisterShared(bytes_, sizeof(bytes_)); }
  T& get() {
    UseShared(bytes_, sizeof(bytes_));
    return reinterpret_cast<T&>(bytes_);
  }

 private:
  alignas(alignof(T) < 16 ? 16 : alignof(T)) unsigned char bytes_[sizeof(T)];
};

// Barrier `id` of the block for `count` threads (-1: all of them, which must wait at one place). Returns how many gave
// `predicate` as true.
int SyncBlock(int id, int count, bool predicate, const Site& site);

// Lanes of `mask` meet; the last one to arrive calls run(args, mask) with what each lane passed, null outside the mask.
using CollectiveFn = void (*)(void* const* args, unsigned mask);
void WarpCollective(unsigned mask, const Site& site, void* arg, CollectiveFn run);

// For loops that wait until another thread of the block has done something. Never for another block: it may not have
// started.
void Yield(const Site& site);

// An access of `count` threads to 16 bytes each, which one pass serves if no two of them share a bank.
void CountBankConflicts(const void* const* rows, int count);

// cp.async: the target is NaN until the group that the copy belongs to has been waited for. Bytes from `valid` on are
// zero.
void CopyAsync(void* to, const void* from, int bytes, int valid);
void CommitCopies();
void WaitForCopies(int groups_left);

// Prints the message with the block and thread at fault and aborts.
[[noreturn]] void Fail(const char* message);

}  // namespace kvpage::emulation

#endif  // KVPAGE_TESTING_CUDA_EMULATION_EMULATOR_H_
