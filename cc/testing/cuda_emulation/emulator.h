// The emulated device: runs kernels that were compiled as C++ on the calling thread. Each thread of a block is a fiber
// that runs until it has to wait for others.
//
// It is built to reveal bugs, not for speed. Shared memory is NaN when a block starts. The process ends with a message
// if threads deadlock, if collective calls have different masks or locations, or if threads return while others wait
// for them. With a seed, blocks, warps and lanes run in random order and blocks take turns, so that a missing barrier
// changes results. Asynchronous copies arrive only when they are waited for. Global memory is the heap, whose bounds
// AddressSanitizer checks. A kernel that may overlap its predecessor is run twice: first up to its wait, with
// parameters whose pointers fault, because it must not touch global memory before the wait.
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

// Where a thread waits: printed in messages, and compared if all threads must wait at the same place.
struct Site {
  const char* what = "";
  const char* file = "";
  int line = 0;
};

// ---- settings for tests ----
struct Device {
  int num_sms = 4;
  // Static and dynamic shared memory of a kernel with the attribute set; the limit is 48 KiB without it. Must not
  // change once a kernel has run; KVPAGE_EMULATED_SHARED_KIB sets it from the start.
  int shared_bytes_per_block = 227 << 10;
  int major = 9, minor = 0;
  // The architecture that the kernels' code was compiled for. Below 90 there is no instruction that waits for the prior
  // kernel, as in code that the driver compiles from older PTX for a newer GPU. KVPAGE_EMULATED_CODE sets it.
  int code_version = 90;
  std::uint64_t seed = 0;  // 0: run in ascending order
  // Limit on the processor time of kernels that are launched together. They usually take milliseconds, or a second with
  // sanitizers.
  double launch_seconds = 60;
};
Device& device();

// The number of kernels launched so far.
std::int64_t NumLaunches();

// Shared memory accesses by ldmatrix that had to be repeated because of bank conflicts.
std::int64_t NumBankConflicts();

// Static shared memory that every kernel is charged for, used or not: variables padded to the alignment of the dynamic
// shared memory. A kernel that uses more ends the process.
inline constexpr int kStaticSharedBytes = 1024;

// ---- for launches (kernels.cc) ----
struct KernelLaunch {
  const void* kernel = nullptr;
  Index3 grid, block;
  std::size_t shared_bytes = 0;
  bool overlap = false;
  std::function<void()> body;   // run by each thread
  std::function<void()> early;  // the same, with parameters whose pointers fault; only called with `overlap`
};
// Runs launches concurrently: their blocks take turns.
void Run(const std::vector<const KernelLaunch*>& together);

// ---- for device code ----
// Called where an overlapped kernel waits for the one before it.
void WaitForPriorKernel();

int Lane();
int LinearThread();
unsigned char* DynamicShared();

// Registers [p, p + bytes) as shared memory: filled with NaN at the start of every block.
void RegisterShared(void* p, std::size_t bytes);

// Counts `bytes` at p as static shared memory of the running kernel.
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

// Barrier `id` of the block for `count` threads, or for all of them if -1, which must then wait at the same place.
// Returns for how many threads `predicate` was true.
int SyncBlock(int id, int count, bool predicate, const Site& site);

// The lanes of `mask` meet here. The last one to arrive calls run(args, mask) with each lane's argument, null for lanes
// outside of the mask.
using CollectiveFn = void (*)(void* const* args, unsigned mask);
void WarpCollective(unsigned mask, const Site& site, void* arg, CollectiveFn run);

// For loops that wait for another thread of the block. They must not wait for another block, which may not have
// started.
void Yield(const Site& site);

// Counts the conflicts of `count` threads that access 16 bytes each; a single pass is enough if no two of them share a
// bank.
void CountBankConflicts(const void* const* rows, int count);

// cp.async: the target is NaN until the copy's group has been waited for. Bytes from `valid` on are zero.
void CopyAsync(void* to, const void* from, int bytes, int valid);
void CommitCopies();
void WaitForCopies(int groups_left);

// Prints the message with the block and thread at fault and aborts.
[[noreturn]] void Fail(const char* message);

}  // namespace kvpage::emulation

#endif  // KVPAGE_TESTING_CUDA_EMULATION_EMULATOR_H_
