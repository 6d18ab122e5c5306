// MemoryFile: a memfd with the blocks of one sequence, apart from a pool's own memory: what another process may
// receive.
//
// Whoever has the descriptor can map all of the file, so nothing else is ever in it. Before it is sent it is sealed:
// from then on nobody, its maker included, can write, shrink or grow it. A receiver asks the kernel for these seals;
// without them the sender could change what was checked, or cut the file short, which ends a process that has it mapped
// (SIGBUS).
#ifndef KVPAGE_VMM_MEMORY_FILE_H_
#define KVPAGE_VMM_MEMORY_FILE_H_

#include <cstdint>
#include <memory>

#include "base/status.h"

namespace kvpage {

class MemoryFile {
 public:
  // A file of `bytes` bytes, all of them holes, which can be sealed.
  static Status Make(std::int64_t bytes, std::shared_ptr<MemoryFile>* out);
  // A file that another process has made, through a descriptor of this one, which stays the caller's. Refuses whatever
  // is not a sealed memfd of ordinary pages.
  static Status Receive(int fd, std::shared_ptr<MemoryFile>* out);
  ~MemoryFile();
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  int fd() const { return fd_; }
  std::int64_t bytes() const { return bytes_; }
  bool received() const { return received_; }
  bool sealed() const { return sealed_; }
  // Bytes allocated for the file according to the system; -1: unknown.
  std::int64_t PhysicalBytes() const;

  // Gives a part of the file memory, zero-filled, so that later accesses cannot fail.
  Status Allocate(std::int64_t offset, std::int64_t bytes);
  // Makes a part of the file a hole. A failure leaves its memory.
  void Punch(std::int64_t offset, std::int64_t bytes);
  Status Write(std::int64_t offset, const void* data, std::int64_t bytes);
  Status Read(std::int64_t offset, void* data, std::int64_t bytes) const;
  // Whether every page of a part has memory. Reading a hole would take memory that nobody has accounted for.
  bool Filled(std::int64_t offset, std::int64_t bytes) const;
  // No mapping through which this process could write may be left.
  Status Seal();

 private:
  MemoryFile(int fd, std::int64_t bytes, bool received) : fd_(fd), bytes_(bytes), received_(received) {}

  const int fd_;
  const std::int64_t bytes_;
  const bool received_;
  bool sealed_ = false;
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_MEMORY_FILE_H_
