// MemoryFile: a memfd with the blocks of one sequence, separate from a pool's own memory, so that another process can
// receive it.
//
// Anybody with the descriptor can map the whole file, so it never contains anything else. It is sealed before it is
// sent: from then on nobody, including its creator, can write, shrink or grow it. A receiver checks these seals with
// the kernel; without them the sender could change what was checked, or truncate the file, which kills a process that
// has it mapped (SIGBUS).
#ifndef KVPAGE_VMM_MEMORY_FILE_H_
#define KVPAGE_VMM_MEMORY_FILE_H_

#include <cstdint>
#include <memory>

#include "base/status.h"

namespace kvpage {

class MemoryFile {
 public:
  // Creates a sealable file of `bytes` bytes, initially a hole.
  static Status Make(std::int64_t bytes, std::shared_ptr<MemoryFile>* out);
  // Opens a file from another process through a descriptor, which the caller keeps. Refuses anything but a sealed memfd
  // of ordinary pages.
  static Status Receive(int fd, std::shared_ptr<MemoryFile>* out);
  ~MemoryFile();
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  int fd() const { return fd_; }
  std::int64_t bytes() const { return bytes_; }
  bool received() const { return received_; }
  bool sealed() const { return sealed_; }
  // Bytes allocated for the file according to the system; -1 if unknown.
  std::int64_t PhysicalBytes() const;

  // Allocates zero-filled memory for a part of the file, so that later accesses cannot fail.
  Status Allocate(std::int64_t offset, std::int64_t bytes);
  // Turns a part of the file into a hole. After a failure it keeps its memory.
  void Punch(std::int64_t offset, std::int64_t bytes);
  Status Write(std::int64_t offset, const void* data, std::int64_t bytes);
  Status Read(std::int64_t offset, void* data, std::int64_t bytes) const;
  // Whether every page of a part has memory. Reading a hole would allocate memory that is not accounted for.
  bool Filled(std::int64_t offset, std::int64_t bytes) const;
  // There must be no mapping left through which this process could write.
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
