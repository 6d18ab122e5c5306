// BlockMover: copies between blocks that the host cannot read or write where they lie and memory of the host.
//
// For threads that belong to no pool. All calls may come from any thread; each returns when its copies are done, and
// waits for these copies only. What programs do with the blocks meanwhile is the caller's concern: they must not write
// blocks that are read, nor use blocks that are written.
#ifndef KVPAGE_VMM_BLOCK_MOVER_H_
#define KVPAGE_VMM_BLOCK_MOVER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"

namespace kvpage {

class BlockMover {
 public:
  virtual ~BlockMover() = default;

  // `block` is an address in the block window (Vmm::Window).
  struct ToHost {
    char* host;
    const char* block;
  };
  struct ToBlock {
    char* block;
    const char* host;
  };
  // Copies `bytes` each. After a failure the targets may hold anything.
  virtual Status Copy(const std::vector<ToHost>& copies, std::int64_t bytes) = 0;
  virtual Status Copy(const std::vector<ToBlock>& copies, std::int64_t bytes) = 0;

  // Memory of the host that copies reach directly; for copies of every mover of the process. Others go through a
  // buffer of the driver's. Freed with its last owner.
  virtual Status MakeBuffer(std::int64_t bytes, std::shared_ptr<char>* out) = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_BLOCK_MOVER_H_
