// A block file: written completely or not at all, read in pieces; blocks are checked as they are read.
#ifndef KVPAGE_STORE_BLOCK_FILE_H_
#define KVPAGE_STORE_BLOCK_FILE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "store/file_header.h"
#include "store/file_io.h"
#include "store/folder.h"

namespace kvpage::store {

// Blocks are written and read in pieces of at least this many bytes.
constexpr std::int64_t kPieceBytes = std::int64_t{2} << 20;

// crc32c of a block whose ranges are at separate addresses.
std::uint32_t Checksum(const BlockShape& shape, const char* const* ranges);
// Reads `count` consecutive blocks, starting at `offset`, to `destinations`, [count, ranges], and checks their
// checksums. `good`: number of leading blocks that are correct.
Problem ReadBlocks(FileIo* io, int fd, const BlockShape& shape, std::int64_t offset, std::int64_t count,
                   char* const* destinations, const std::uint32_t* checksums, std::int64_t* good);

// Writes the blocks at `sources`, [blocks, ranges], and sets header->checksums, which must have a place for each. The
// file gets its name when it is completely on disk.
Status WriteBlockFile(FileIo* io, const Folder& folder, FileHeader* header, const char* const* sources,
                      std::string* name, std::int64_t* bytes);

// An open file whose header has been checked.
class BlockFile {
 public:
  Problem Open(FileIo* io, const Folder& folder, const std::string& name);
  const FileHeader& header() const { return header_; }
  std::int64_t bytes() const { return data_begin_ + header_.data_bytes(); }
  // Reads `count` blocks, starting at the `begin`-th of the file, to `destinations`, [count, ranges]. `good`: number of
  // leading blocks that are correct.
  Problem Read(FileIo* io, std::int64_t begin, std::int64_t count, char* const* destinations, std::int64_t* good) const;
  // Marks the file as used now.
  void Touch() const;

 private:
  Fd fd_;
  FileHeader header_;
  std::int64_t data_begin_ = 0;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_BLOCK_FILE_H_
