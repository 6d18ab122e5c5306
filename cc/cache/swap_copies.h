// How threads of a store copy blocks of swapped sequences: as memory of the host, or through the mover of a device.
#ifndef KVPAGE_CACHE_SWAP_COPIES_H_
#define KVPAGE_CACHE_SWAP_COPIES_H_

#include <memory>

#include "cache/arena.h"
#include "cache/swap_table.h"
#include "store/swap_store.h"

namespace kvpage::swapping {

// Says what is to be written of a sequence, and how: all but the blocks that it keeps in memory.
Status DescribeWrite(Arena* arena, const SwapPtr& swap, store::SwapWrite* write);
// Says where what was written of it is to go.
Status DescribeRead(Arena* arena, const SwapPtr& swap, store::SwapRead* read);

}  // namespace kvpage::swapping

#endif  // KVPAGE_CACHE_SWAP_COPIES_H_
