// DevicePool::readers: how many blocks of running ops may still use a pool. When the host changes the generation,
// closes the pool or removes it from the table, it then waits until the count is zero (DeviceState::WaitForReaders).
//
// An op counts itself in before it reads anything else of the pool, and the host writes before it reads the count: so
// either the op sees what the host wrote and is refused, or the host sees the op. The check counts in all blocks of the
// op's last kernel, and each of these blocks counts itself out at its end with an atomic add that returns no value, so
// no extra launch is needed. This works on every stream and in graphs.
#ifndef KVPAGE_KERNELS_CUDA_READERS_CUH_
#define KVPAGE_KERNELS_CUDA_READERS_CUH_

#include <cstdint>

#include "base/spec_fields.h"
#include "kernels/cuda/device.cuh"

namespace kvpage::cuda {

// Called by one thread. Later reads see everything that the host wrote before it last read the count.
__device__ __forceinline__ void CountIn(DevicePool* pool, std::uint32_t blocks) {
  atomicAdd(&pool->readers, blocks);
  __threadfence_system();
}

// Called by one thread, after a barrier of the threads that used the pool.
__device__ __forceinline__ void CountOut(std::uint32_t* readers, std::uint32_t blocks) {
  __threadfence_system();
  atomicSub(readers, blocks);
}

// The part of an entry that a check compares.
struct PoolHead {
  std::int32_t id, open, generation, allow_stale;
  std::uint32_t epoch;
  std::int64_t spec[kNumSpecFields];
  DeviceSlot* slots;
  std::int32_t* written;
  std::uint32_t* marks;

  // Volatile, so that all fields are read together: reading each on its own would be a round trip to memory.
  __device__ __forceinline__ void Read(const volatile DevicePool& entry) {
    id = entry.id;
    open = entry.open;
    generation = entry.generation;
    allow_stale = entry.allow_stale;
    epoch = entry.epoch;
#pragma unroll
    for (int i = 0; i < kNumSpecFields; ++i) spec[i] = entry.spec[i];
    slots = entry.slots;
    written = entry.written;
    marks = entry.marks;
  }
};

// Called by one thread: finds a pool in the table, counts `blocks` in and reads its head. Returns null if it is not
// there.
__device__ __forceinline__ DevicePool* EnterPool(DevicePool* pools, std::int32_t id, std::uint32_t blocks,
                                                 PoolHead* head) {
  for (std::int32_t i = 0; id > 0 && i < kMaxDevicePools; ++i) {
    DevicePool* const entry = &pools[(id % kMaxDevicePools + i) % kMaxDevicePools];
    // At the entry where the search begins, the op is counted in before the id is known, which saves another round
    // trip.
    const std::int32_t seen = i == 0 ? id : *const_cast<const volatile std::int32_t*>(&entry->id);
    if (seen == kEmptyEntry) break;
    if (seen != id) continue;
    CountIn(entry, blocks);
    head->Read(*entry);
    if (head->id == id) return entry;
    CountOut(&entry->readers, blocks);
    if (head->id == kEmptyEntry) break;
  }
  return nullptr;
}

// Called by one thread of a block that no longer uses the pool. `last`: this launch is the op's last one.
__device__ __forceinline__ void CountBlockOut(const CheckedBatch* checked, bool last) {
#ifdef KVPAGE_EMULATED
  if (checked->readers != nullptr && *checked->readers == 0) emulation::Fail("the op is counted out already");
#endif
  if (last && checked->readers != nullptr) CountOut(checked->readers, 1);
}

// Must be the first statement of every kernel that may be an op's last one: counts the block out at its end, on every
// path. `last`: this launch is the op's last one. All threads of the block must leave the kernel together.
class CountedBlock {
 public:
  __device__ __forceinline__ CountedBlock(const CheckedBatch* checked, bool last) : checked_(checked), last_(last) {}
  __device__ __forceinline__ ~CountedBlock() {
    if (last_) __syncthreads();
    if (threadIdx.x == 0) CountBlockOut(checked_, last_);
  }
  CountedBlock(const CountedBlock&) = delete;
  CountedBlock& operator=(const CountedBlock&) = delete;

 private:
  const CheckedBatch* const checked_;
  const bool last_;
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_READERS_CUH_
