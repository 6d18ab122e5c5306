// How store threads copy blocks of swapped sequences: directly in host memory, or through the mover of a device.
#ifndef KVPAGE_CACHE_SWAP_COPIES_H_
#define KVPAGE_CACHE_SWAP_COPIES_H_

#include <memory>

#include "cache/arena.h"
#include "cache/swap_table.h"
#include "store/swap_store.h"

namespace kvpage::swapping {

// Describes what is to be written of a sequence, and how: all blocks except those that stay in memory.
Status DescribeWrite(Arena* arena, const SwapPtr& swap, store::SwapWrite* write);
// Describes where the written blocks are to be restored.
Status DescribeRead(Arena* arena, const SwapPtr& swap, store::SwapRead* read);

}  // namespace kvpage::swapping

#endif  // KVPAGE_CACHE_SWAP_COPIES_H_
