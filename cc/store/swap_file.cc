#include "store/swap_file.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <utility>

#include "store/block_file.h"

namespace kvpage::store {

SwapFile::SwapFile(BlockShape shape, Fd fd) : process_(getpid()), shape_(std::move(shape)), fd_(std::move(fd)) {}

SwapFile::~SwapFile() {
  if (getpid() != process_) return;  // a forked child has a copy of the descriptor, and the parent still needs the file
  // The child's copy must not keep disk space allocated.
  static_cast<void>(ftruncate(fd_.get(), 0) == 0);
  if (on_end_) on_end_();
}

Status SwapFile::Write(FileIo* io, const Folder& folder, const BlockShape& shape, std::int64_t blocks,
                       const SwapWrite::CopyBlocks& copy, std::shared_ptr<SwapFile>* out) {
  out->reset();
  std::string name;
  Fd fd;
  KVPAGE_RETURN_IF_ERROR(folder.MakeTemporary(&name, &fd));
  // If the process is killed before this, it leaves an empty file, which is removed like those of other dead writers.
  if (!folder.Remove(name)) return FileError("remove " + name + " from " + folder.path(), errno);
  const std::string what = "write to " + folder.path();
  std::shared_ptr<SwapFile> file(new SwapFile(shape, std::move(fd)));
  const std::int64_t piece = std::max<std::int64_t>(kPieceBytes / shape.bytes(), 1);
  std::vector<char> buffer(static_cast<std::size_t>(std::min(piece, blocks) * shape.bytes()));
  for (std::int64_t begin = 0; begin < blocks; begin += piece) {
    const std::int64_t count = std::min(piece, blocks - begin);
    if (!copy(begin, count, buffer.data())) return {};
    std::vector<const char*> ranges;
    for (std::int64_t i = 0; i < count * shape.ranges; ++i) ranges.push_back(buffer.data() + i * shape.block_bytes);
    for (std::int64_t i = 0; i < count; ++i) file->checksums_.push_back(Checksum(shape, &ranges[i * shape.ranges]));
    const iovec part = {buffer.data(), static_cast<std::size_t>(count * shape.bytes())};
    const int error = WriteAll(io, file->fd_.get(), {part}, begin * shape.bytes());
    if (error != 0) return FileError(what, error);
  }
  // Sync now: a later error would lose the data, because the memory of the blocks is reused next.
  if (io->Sync(file->fd_.get()) != 0) return FileError(what, errno);
  *out = std::move(file);
  return {};
}

Problem SwapFile::Read(FileIo* io, std::int64_t begin, std::int64_t count, char* const* destinations,
                       std::int64_t* good) const {
  return ReadBlocks(io, fd_.get(), shape_, begin * shape_.bytes(), count, destinations, &checksums_[begin], good);
}

}  // namespace kvpage::store
