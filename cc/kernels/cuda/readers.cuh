// DevicePool::readers: how many blocks of running ops may still use a pool. The host changes the generation, closes the
// pool or takes it off the table, and then waits until nobody is counted (DeviceState::WaitForReaders).
//
// An op counts itself in before it looks at anything else of the pool, and the host writes before it reads the count:
// either the op sees what the host wrote and is refused, or the host sees the op. The check counts in every block of
// the op's last kernel, and each of these counts itself out when it ends: an atomic whose result nobody waits for, and
// no further launch. A launch in a graph counts like any other, regardless of its stream.
#ifndef KVPAGE_KERNELS_CUDA_READERS_CUH_
#define KVPAGE_KERNELS_CUDA_READERS_CUH_

#include <cstdint>

#include "base/spec_fields.h"
#include "kernels/cuda/device.cuh"

namespace kvpage::cuda {

// One thread. What it reads after this is what the host wrote before it last saw the count.
__device__ __forceinline__ void CountIn(DevicePool* pool, std::uint32_t blocks) {
  atomicAdd(&pool->readers, blocks);
  __threadfence_system();
}

// One thread, after a barrier of those that used the pool.
__device__ __forceinline__ void CountOut(std::uint32_t* readers, std::uint32_t blocks) {
  __threadfence_system();
  atomicSub(readers, blocks);
}

// What a check compares of an entry.
struct PoolHead {
  std::int32_t id, open, generation, allow_stale;
  std::uint32_t epoch;
  std::int64_t spec[kNumSpecFields];
  DeviceSlot* slots;
  std::int32_t* written;
  std::uint32_t* marks;

  // Volatile, so that everything is read together: each field alone would be a trip to memory.
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

// One thread: finds a pool in the table, counts `blocks` in and reads its head; null: it is not there.
__device__ __forceinline__ DevicePool* EnterPool(DevicePool* pools, std::int32_t id, std::uint32_t blocks,
                                                 PoolHead* head) {
  for (std::int32_t i = 0; id > 0 && i < kMaxDevicePools; ++i) {
    DevicePool* const entry = &pools[(id % kMaxDevicePools + i) % kMaxDevicePools];
    // Where the search begins the op is counted before the id is known, which saves another trip.
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

// One thread of a block that has ended its use of the pool. `last`: whether this launch is the op's last one.
__device__ __forceinline__ void CountBlockOut(const CheckedBatch* checked, bool last) {
#ifdef KVPAGE_EMULATED
  if (checked->readers != nullptr && *checked->readers == 0) emulation::Fail("the op is counted out already");
#endif
  if (last && checked->readers != nullptr) CountOut(checked->readers, 1);
}

// In every kernel that may be an op's last one, before anything else: counts the block out at its end, on every path.
// `last`: whether this launch is the op's last one. All threads of the block must leave the kernel together.
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
