// The operations of programs on a pool, called by the FFI handlers while a program runs. `op` begins every message.
#ifndef KVPAGE_CACHE_PROGRAM_OPS_H_
#define KVPAGE_CACHE_PROGRAM_OPS_H_

#include <cstdint>

#include "cache/parts.h"

namespace kvpage::program_ops {

// Starts reading (append false) or writing and possibly reading (append true) one layer; it ends with `pinned`.
// `by_block`: how to address the blocks by number; null: the handler uses the slots.
Status Begin(const PoolParts& pool, const char* op, const CacheRef& cache, const BatchRef& batch, std::int64_t layer,
             bool append, PinnedSlots* pinned, TableCall* by_block = nullptr);
Status Advance(const PoolParts& pool, const char* op, const CacheRef& cache, const BatchRef& batch,
               std::uint32_t* epoch, std::int32_t* lengths);
Status SetLengths(const PoolParts& pool, const char* op, const CacheRef& cache, const std::int32_t* slots,
                  const std::int32_t* values, std::int64_t count, std::uint32_t* epoch, std::int32_t* lengths);

}  // namespace kvpage::program_ops

#endif  // KVPAGE_CACHE_PROGRAM_OPS_H_
