// Counts what asynchronous copies read on the emulated device, for tests that something is read only once.
#ifndef KVPAGE_TESTING_CUDA_EMULATION_COPY_COUNTER_H_
#define KVPAGE_TESTING_CUDA_EMULATION_COPY_COUNTER_H_

#include <cstdint>

namespace kvpage::emulation {

// Bytes of global memory that asynchronous copies have read so far.
std::int64_t NumCopiedBytes();

}  // namespace kvpage::emulation

#endif  // KVPAGE_TESTING_CUDA_EMULATION_COPY_COUNTER_H_
