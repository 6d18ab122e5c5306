// The header of a block file: a description of its blocks, and their checksums.
//
// A file is a safetensors container with one tensor, "blocks", uint8 [blocks, ranges, block_bytes]: consecutive logical
// blocks of one sequence. The metadata describes the sequence, with all its tokens from the start, so that a file can
// be checked without any other; it is protected by a checksum too. The size of the header does not depend on the block
// checksums: their space is reserved until the blocks have been written.
#ifndef KVPAGE_STORE_FILE_HEADER_H_
#define KVPAGE_STORE_FILE_HEADER_H_

#include <cstdint>
#include <string>
#include <vector>

namespace kvpage::store {

// Why a file, or a block in a file, counts as not stored.
enum class Problem : std::uint8_t {
  kNone = 0,
  kDamaged,      // checksum mismatch or invalid header
  kTruncated,    // shorter or longer than its header says
  kVersion,      // of another version of this format, or of another program
  kFingerprint,  // of another model
  kGeometry,     // of a cache with another geometry
  kUnreadable,   // the system refuses to open or read it
  kGone,         // removed or replaced since it was found
  kClosed,       // the store was closed
};
constexpr int kNumProblems = 9;
const char* Name(Problem problem);

// The layout of keys and values in a block. `layout` is a textual description that is compared.
struct BlockShape {
  std::string layout;
  std::int64_t block_tokens = 0;
  std::int64_t ranges = 0;
  std::int64_t block_bytes = 0;

  std::int64_t bytes() const { return ranges * block_bytes; }  // of a logical block
  bool operator==(const BlockShape& other) const {
    return layout == other.layout && block_tokens == other.block_tokens && ranges == other.ranges &&
           block_bytes == other.block_bytes;
  }
};

// Sequences are shared only if all of this is equal.
struct Identity {
  BlockShape shape;
  std::string fingerprint;  // identifies the model
  std::string space;        // namespace

  bool operator==(const Identity& other) const {
    return shape == other.shape && fingerprint == other.fingerprint && space == other.space;
  }
};

struct FileHeader {
  Identity identity;
  std::int64_t first_block = 0;
  std::vector<std::int32_t> tokens;      // from the start of the sequence to the end of the last block
  std::vector<std::uint32_t> checksums;  // crc32c of each block

  std::int64_t blocks() const { return static_cast<std::int64_t>(checksums.size()); }
  std::int64_t data_bytes() const { return blocks() * identity.shape.bytes(); }
};

// Alignment of the first block in a file.
constexpr std::int64_t kDataAlignment = 4096;
constexpr std::int64_t kMostHeaderBytes = std::int64_t{64} << 20;

// Hash of the empty prefix of an identity. Hashes of prefixes link a file to those with the preceding blocks.
std::uint64_t HashIdentity(const Identity& identity);
std::uint64_t HashPrefix(const Identity& identity, const std::int32_t* tokens, std::int64_t blocks);

// The beginning of the file, up to its blocks. Its size does not depend on the checksums.
std::string EncodeHeader(const FileHeader& header);
// `bytes` is the beginning of a file, up to its blocks.
Problem DecodeHeader(const std::string& bytes, FileHeader* out);

// The name of a file, which is determined by its contents.
std::string FileName(const FileHeader& header);
extern const char kSuffix[];

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_FILE_HEADER_H_
