// The header of a block file: what its blocks are, and a checksum of each.
//
// A file is a safetensors container with one tensor, "blocks", uint8 [blocks, ranges, block_bytes]: consecutive logical
// blocks of one sequence. The metadata says whose they are. It names the tokens of the sequence from its beginning, so
// that a file can be checked without another one, and is covered by a checksum too. The size of the header follows from
// what it says apart from the checksums: its space is left free until the blocks have been written.
#ifndef KVPAGE_STORE_FILE_HEADER_H_
#define KVPAGE_STORE_FILE_HEADER_H_

#include <cstdint>
#include <string>
#include <vector>

namespace kvpage::store {

// Why a file, or a block of one, counts as not stored.
enum class Problem : std::uint8_t {
  kNone = 0,
  kDamaged,      // not what the writer wrote: a checksum, the header
  kTruncated,    // shorter or longer than its header says
  kVersion,      // of another version of this format, or another program's
  kFingerprint,  // of another model
  kGeometry,     // of a cache with another geometry
  kUnreadable,   // the system refuses to open or read it
  kGone,         // removed or replaced since it was found
  kClosed,       // the store was closed
};
constexpr int kNumProblems = 9;
const char* Name(Problem problem);

// How keys and values lie in a block. `layout` describes it in words that are compared.
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

// Sequences are shared only where all of this is equal.
struct Identity {
  BlockShape shape;
  std::string fingerprint;  // of the model whose keys and values they are
  std::string space;        // namespace

  bool operator==(const Identity& other) const {
    return shape == other.shape && fingerprint == other.fingerprint && space == other.space;
  }
};

struct FileHeader {
  Identity identity;
  std::int64_t first_block = 0;
  std::vector<std::int32_t> tokens;      // from the beginning of the sequence to the end of the last block
  std::vector<std::uint32_t> checksums;  // crc32c of each block

  std::int64_t blocks() const { return static_cast<std::int64_t>(checksums.size()); }
  std::int64_t data_bytes() const { return blocks() * identity.shape.bytes(); }
};

// Where the blocks begin in a file is a multiple of this.
constexpr std::int64_t kDataAlignment = 4096;
constexpr std::int64_t kMostHeaderBytes = std::int64_t{64} << 20;

// Hash of a prefix of a sequence, which is the link of a file to those that hold what comes before.
std::uint64_t HashIdentity(const Identity& identity);
std::uint64_t HashPrefix(const Identity& identity, const std::int32_t* tokens, std::int64_t blocks);

// The beginning of the file, up to the blocks. Its size does not depend on the checksums.
std::string EncodeHeader(const FileHeader& header);
// `bytes` is the beginning of a file up to where its blocks begin.
Problem DecodeHeader(const std::string& bytes, FileHeader* out);

// The name of a file follows from what it holds.
std::string FileName(const FileHeader& header);
extern const char kSuffix[];

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_FILE_HEADER_H_
