#include "testing/cuda_emulation/emulator.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "testing/cuda_emulation/block.h"
#include "testing/cuda_emulation/cuda_runtime.h"

namespace kvpage::emulation {
namespace {

struct Range {
  void* p;
  std::size_t bytes;
};
std::vector<Range>& SharedRanges() {
  static auto* const ranges = new std::vector<Range>;
  return *ranges;
}

std::int64_t bank_conflicts = 0;

// Returns the number in an environment variable, or `otherwise` if it is not set.
int FromEnvironment(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text != nullptr ? static_cast<int>(std::strtol(text, nullptr, 10)) : otherwise;
}

}  // namespace

Device& device() {
  static Device device = [] {
    Device initial;
    initial.code_version = FromEnvironment("KVPAGE_EMULATED_CODE", initial.code_version);
    initial.shared_bytes_per_block = FromEnvironment("KVPAGE_EMULATED_SHARED_KIB", initial.shared_bytes_per_block >> 10)
                                     << 10;
    return initial;
  }();
  return device;
}

void SaveShared(std::vector<unsigned char>* bytes) {
  bytes->clear();
  for (const Range& range : SharedRanges()) {
    const auto* const from = static_cast<const unsigned char*>(range.p);
    bytes->insert(bytes->end(), from, from + range.bytes);
  }
}

void RestoreShared(const std::vector<unsigned char>& bytes) {
  std::size_t at = 0;
  for (const Range& range : SharedRanges()) {  // variables newer than the copy were not used by the block
    const std::size_t saved = std::min(bytes.size() - at, range.bytes);
    if (saved > 0) std::memcpy(range.p, bytes.data() + at, saved);
    std::memset(static_cast<unsigned char*>(range.p) + saved, 0xff, range.bytes - saved);
    at += saved;
  }
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

std::int64_t NumBankConflicts() { return bank_conflicts; }

void CountBankConflicts(const void* const* rows, int count) {
  constexpr int kWarpThreads = 32, kRowBytes = 16, kBankGroups = 128 / kRowBytes;
  if (count > kWarpThreads) Fail("an access to shared memory is a warp's at most");
  std::uintptr_t different[kWarpThreads];  // threads that give the same address share an access
  int num_different = 0, passes[kBankGroups] = {}, most = 1;
  for (int i = 0; i < count; ++i) {
    const std::uintptr_t row = reinterpret_cast<std::uintptr_t>(rows[i]) / kRowBytes;
    if (std::find(different, different + num_different, row) != different + num_different) continue;
    different[num_different++] = row;
    most = std::max(most, ++passes[row % kBankGroups]);
  }
  bank_conflicts += most - 1;
}

void RegisterShared(void* p, std::size_t bytes) {
  std::memset(p, 0xff, bytes);
  SharedRanges().push_back({p, bytes});
}

void Fail(const char* message) {
  const Block* const b = RunningBlock();
  const int thread = b != nullptr && b->running != nullptr ? b->running->index : -1;
  std::fprintf(stderr, "emulated CUDA: block (%u, %u, %u), thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, thread,
               message);
  std::abort();
}

}  // namespace kvpage::emulation
