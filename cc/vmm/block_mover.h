// BlockMover: copies between host memory and blocks that the host cannot access directly.
//
// For threads that belong to no pool. All calls are thread-safe; each returns when its copies are done, and waits for
// these copies only. The caller must make sure that programs neither write blocks that are being read nor use blocks
// that are being written.
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
  // Copies `bytes` each. After a failure the targets may contain anything.
  virtual Status Copy(const std::vector<ToHost>& copies, std::int64_t bytes) = 0;
  virtual Status Copy(const std::vector<ToBlock>& copies, std::int64_t bytes) = 0;

  // Allocates host memory that the copies of every mover in the process can reach directly; other memory is copied
  // through a buffer of the driver. Freed with its last owner.
  virtual Status MakeBuffer(std::int64_t bytes, std::shared_ptr<char>* out) = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_BLOCK_MOVER_H_
