#include "store/block_file.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>

#include "crc32c/crc32c.h"

namespace kvpage::store {
namespace {

std::vector<iovec> Parts(const BlockShape& shape, const char* const* ranges, std::int64_t blocks) {
  std::vector<iovec> parts;
  for (std::int64_t i = 0; i < blocks * shape.ranges; ++i) {
    const auto size = static_cast<std::size_t>(shape.block_bytes);
    if (!parts.empty() && static_cast<char*>(parts.back().iov_base) + parts.back().iov_len == ranges[i]) {
      parts.back().iov_len += size;
    } else {
      parts.push_back({const_cast<char*>(ranges[i]), size});
    }
  }
  return parts;
}

// Removes an unfinished file.
class Unfinished {
 public:
  Unfinished(const Folder& folder, const std::string& name) : folder_(folder), name_(name) {}
  ~Unfinished() {
    if (!done_) static_cast<void>(folder_.Remove(name_));
  }
  Unfinished(const Unfinished&) = delete;
  Unfinished& operator=(const Unfinished&) = delete;
  void Done() { done_ = true; }

 private:
  const Folder& folder_;
  const std::string& name_;
  bool done_ = false;
};

}  // namespace

std::uint32_t Checksum(const BlockShape& shape, const char* const* ranges) {
  std::uint32_t checksum = 0;
  for (std::int64_t range = 0; range < shape.ranges; ++range) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(ranges[range]);
    checksum = crc32c::Extend(checksum, bytes, static_cast<std::size_t>(shape.block_bytes));
  }
  return checksum;
}

Problem ReadBlocks(FileIo* io, int fd, const BlockShape& shape, std::int64_t offset, std::int64_t count,
                   char* const* destinations, const std::uint32_t* checksums, std::int64_t* good) {
  *good = 0;
  const int error = ReadAll(io, fd, Parts(shape, destinations, count), offset);
  if (error != 0) return error == kEndOfFile ? Problem::kTruncated : Problem::kUnreadable;
  for (; *good < count; ++*good) {
    if (Checksum(shape, destinations + *good * shape.ranges) != checksums[*good]) return Problem::kDamaged;
  }
  return Problem::kNone;
}

Status WriteBlockFile(FileIo* io, const Folder& folder, FileHeader* header, const char* const* sources,
                      std::string* name, std::int64_t* bytes) {
  const BlockShape& shape = header->identity.shape;
  const std::int64_t begin = static_cast<std::int64_t>(EncodeHeader(*header).size());
  const std::string what = "write to " + folder.path();
  std::string temporary;
  Fd fd;
  KVPAGE_RETURN_IF_ERROR(folder.MakeTemporary(&temporary, &fd));
  Unfinished unfinished(folder, temporary);
  const std::int64_t piece = std::max<std::int64_t>(kPieceBytes / shape.bytes(), 1);
  for (std::int64_t block = 0; block < header->blocks(); block += piece) {
    const std::int64_t count = std::min(piece, header->blocks() - block);
    const char* const* const ranges = sources + block * shape.ranges;
    for (std::int64_t i = 0; i < count; ++i) header->checksums[block + i] = Checksum(shape, ranges + i * shape.ranges);
    const int error = WriteAll(io, fd.get(), Parts(shape, ranges, count), begin + block * shape.bytes());
    if (error != 0) return FileError(what, error);
  }
  std::string text = EncodeHeader(*header);
  if (const int error = WriteAll(io, fd.get(), {{text.data(), text.size()}}, 0); error != 0) {
    return FileError(what, error);
  }
  if (io->Sync(fd.get()) != 0) return FileError(what, errno);
  *name = FileName(*header);
  if (io->Rename(folder.fd(), temporary.c_str(), name->c_str()) != 0) return FileError(what, errno);
  unfinished.Done();
  *bytes = begin + header->data_bytes();
  return {};
}

Problem BlockFile::Open(FileIo* io, const Folder& folder, const std::string& name) {
  fd_ = folder.OpenFile(name);
  if (!fd_.ok()) return errno == ENOENT ? Problem::kGone : Problem::kUnreadable;
  struct stat status;
  if (fstat(fd_.get(), &status) != 0 || !S_ISREG(status.st_mode)) return Problem::kUnreadable;
  const auto read = [&](void* to, std::size_t size, std::int64_t offset) {
    const int error = ReadAll(io, fd_.get(), {{to, size}}, offset);
    return error == 0 ? Problem::kNone : error == kEndOfFile ? Problem::kTruncated : Problem::kUnreadable;
  };
  unsigned char prefix[sizeof(std::uint64_t)];
  if (const Problem problem = read(prefix, sizeof prefix, 0); problem != Problem::kNone) return problem;
  std::uint64_t size = 0;
  for (std::size_t i = 0; i < sizeof prefix; ++i) size |= std::uint64_t{prefix[i]} << (8 * i);
  if (size == 0 || size > static_cast<std::uint64_t>(kMostHeaderBytes)) return Problem::kDamaged;
  if (static_cast<std::uint64_t>(status.st_size) < sizeof prefix + size) return Problem::kTruncated;
  std::string bytes(sizeof prefix + size, '\0');
  if (const Problem problem = read(bytes.data(), bytes.size(), 0); problem != Problem::kNone) return problem;
  if (const Problem problem = DecodeHeader(bytes, &header_); problem != Problem::kNone) return problem;
  data_begin_ = static_cast<std::int64_t>(bytes.size());
  return status.st_size == this->bytes() ? Problem::kNone : Problem::kTruncated;
}

Problem BlockFile::Read(FileIo* io, std::int64_t begin, std::int64_t count, char* const* destinations,
                        std::int64_t* good) const {
  const BlockShape& shape = header_.identity.shape;
  return ReadBlocks(io, fd_.get(), shape, data_begin_ + begin * shape.bytes(), count, destinations,
                    &header_.checksums[begin], good);
}

void BlockFile::Touch() const { static_cast<void>(futimens(fd_.get(), nullptr)); }

}  // namespace kvpage::store
