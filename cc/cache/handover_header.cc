#include "cache/handover_header.h"

#include <cstring>
#include <limits>
#include <utility>

#include "cache/prefix_store.h"
#include "crc32c/crc32c.h"
#include "vmm/limits.h"

namespace kvpage::handover {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "headers are read and written as they lie in memory");

constexpr char kMagic[8] = {'K', 'V', 'P', 'A', 'G', 'E', 'H', 'O'};
constexpr std::uint32_t kVersion = 1;
constexpr std::int64_t kMaxShape = 256;
constexpr char kMemory[] = " memory=";

struct Fixed {
  char magic[8];
  std::uint32_t version, crc;
  std::int64_t begin, tokens, blocks, stride, block_bytes, ranges;
  std::uint32_t shape_bytes, fingerprint_bytes;
};
static_assert(sizeof(Fixed) == 72, "no padding");
constexpr std::size_t kChecked = offsetof(Fixed, begin);  // the checksum covers everything from here on

std::string Number(std::int64_t value) { return std::to_string(value); }

// Text from a sender, for a message: it may contain any bytes.
std::string Quoted(std::string text) {
  for (char& letter : text) {
    if (letter < ' ' || letter > '~') letter = '?';
  }
  return "'" + text + "'";
}

std::string ShapeText(const Header& header) {
  return header.memory.empty() ? header.shape : header.shape + kMemory + header.memory;
}

Status Damaged(const std::string& what) {
  return InvalidArgument("the memfd is damaged or was not made by export_blocks: " + what);
}

}  // namespace

std::string ShapeOf(const Geometry& geometry) {
  const store::BlockShape shape = prefix::StoredShape(geometry);
  return shape.layout + " block_tokens=" + Number(shape.block_tokens) + " block_bytes=" + Number(shape.block_bytes);
}

std::int64_t HeaderBytes(std::int64_t tokens) {
  const std::int64_t bytes = static_cast<std::int64_t>(sizeof(Fixed)) + kMaxShape + kMaxFingerprint + 4 * tokens;
  return (bytes + PageBytes() - 1) / PageBytes() * PageBytes();
}

Status WriteHeader(const Header& header, MemoryFile* file) {
  Fixed fixed = {};
  std::memcpy(fixed.magic, kMagic, sizeof(kMagic));
  fixed.version = kVersion;
  fixed.begin = header.begin;
  fixed.tokens = header.tokens;
  fixed.blocks = header.blocks;
  fixed.stride = header.stride;
  fixed.block_bytes = header.block_bytes;
  fixed.ranges = header.ranges;
  const std::string shape = ShapeText(header);
  fixed.shape_bytes = static_cast<std::uint32_t>(shape.size());
  fixed.fingerprint_bytes = static_cast<std::uint32_t>(header.fingerprint.size());
  std::string bytes(reinterpret_cast<const char*>(&fixed), sizeof(fixed));
  bytes += shape + header.fingerprint;
  bytes.append(reinterpret_cast<const char*>(header.ids.data()), 4 * header.ids.size());
  const std::uint32_t crc = crc32c::Crc32c(bytes.data() + kChecked, bytes.size() - kChecked);
  std::memcpy(&bytes[offsetof(Fixed, crc)], &crc, sizeof(crc));
  return file->Write(0, bytes.data(), static_cast<std::int64_t>(bytes.size()));
}

Status ReadHeader(const MemoryFile& file, Header* out) {
  Fixed fixed;
  if (file.bytes() < static_cast<std::int64_t>(sizeof(fixed))) {
    return Damaged("it has " + Number(file.bytes()) + " bytes, a header has " + Number(sizeof(fixed)));
  }
  KVPAGE_RETURN_IF_ERROR(file.Read(0, &fixed, sizeof(fixed)));
  if (std::memcmp(fixed.magic, kMagic, sizeof(kMagic)) != 0) return Damaged("it does not begin with KVPAGEHO");
  if (fixed.version != kVersion) {
    return InvalidArgument("the sequence has format version " + Number(fixed.version) + ", this jax_kvpage reads " +
                           Number(kVersion) + ": use the same release in both processes");
  }
  constexpr std::int64_t kMany = std::numeric_limits<std::int32_t>::max();
  if (fixed.tokens < 1 || fixed.tokens > kMany || fixed.shape_bytes > kMaxShape ||
      fixed.fingerprint_bytes > kMaxFingerprint) {
    return Damaged("its header counts " + Number(fixed.tokens) + " tokens, " + Number(fixed.shape_bytes) +
                   " bytes of shape and " + Number(fixed.fingerprint_bytes) + " of fingerprint");
  }
  const std::int64_t text = std::int64_t{fixed.shape_bytes} + fixed.fingerprint_bytes;
  const std::int64_t bytes = static_cast<std::int64_t>(sizeof(fixed)) + text + 4 * fixed.tokens;
  if (bytes > file.bytes()) {
    return Damaged("its header takes " + Number(bytes) + " bytes, the file has " + Number(file.bytes()));
  }
  if (!file.Filled(0, bytes)) return Damaged("a part of its header has no memory");
  std::string all(static_cast<std::size_t>(bytes), '\0');
  KVPAGE_RETURN_IF_ERROR(file.Read(0, all.data(), bytes));
  if (crc32c::Crc32c(all.data() + kChecked, all.size() - kChecked) != fixed.crc) {
    return Damaged("the checksum of its header is wrong");
  }
  // A checksum does not protect against a malicious sender, so everything from which addresses are computed is checked
  // too.
  std::string shape = all.substr(sizeof(fixed), fixed.shape_bytes);
  const std::size_t at = shape.find(kMemory);
  const bool has_handles = at != std::string::npos;
  const bool stride_fits = has_handles ? fixed.stride == 0 : fixed.blocks <= fixed.stride && fixed.stride <= kMany;
  const bool is_named = !has_handles || at + sizeof(kMemory) - 1 < shape.size();
  const bool sane = is_named && fixed.blocks >= 1 && fixed.blocks <= kMany && stride_fits && fixed.block_bytes >= 1 &&
                    fixed.ranges >= 1 && fixed.ranges <= kMany && fixed.begin >= bytes &&
                    fixed.begin % PageBytes() == 0 && fixed.block_bytes % PageBytes() == 0;
  std::int64_t size = 0;
  const bool too_large = !sane || __builtin_mul_overflow(fixed.ranges * fixed.stride, fixed.block_bytes, &size) ||
                         __builtin_add_overflow(size, fixed.begin, &size);
  if (too_large || size != file.bytes()) {
    return Damaged("its header says " + Number(fixed.ranges) + " ranges of " + Number(fixed.stride) + " blocks of " +
                   Number(fixed.block_bytes) + " bytes behind " + Number(fixed.begin) + " bytes, the file has " +
                   Number(file.bytes()) + " bytes");
  }
  Header header;
  header.begin = fixed.begin;
  header.tokens = fixed.tokens;
  header.blocks = fixed.blocks;
  header.stride = fixed.stride;
  header.block_bytes = fixed.block_bytes;
  header.ranges = fixed.ranges;
  if (has_handles) {
    header.memory = shape.substr(at + sizeof(kMemory) - 1);
    shape.resize(at);
  }
  header.shape = std::move(shape);
  header.fingerprint = all.substr(sizeof(fixed) + fixed.shape_bytes, fixed.fingerprint_bytes);
  header.ids.resize(static_cast<std::size_t>(fixed.tokens));
  std::memcpy(header.ids.data(), all.data() + sizeof(fixed) + text, 4 * header.ids.size());
  for (std::int64_t range = 0; !has_handles && range < header.ranges; ++range) {
    if (file.Filled(header.Offset(range, 0), header.blocks * header.block_bytes)) continue;
    return Damaged("a part of its blocks has no memory");
  }
  *out = std::move(header);
  return {};
}

Status CheckFits(const Header& header, const Geometry& geometry, const std::string& memory,
                 const std::string& fingerprint) {
  if (header.memory != memory) {
    const auto place = [](const std::string& name) { return name.empty() ? "memory of the host" : Quoted(name); };
    return InvalidArgument("the sequence is in " + place(header.memory) + ", this pool's blocks are in " +
                           place(memory) + ": hand over between pools of one device, or send arrays (read_kv)");
  }
  if (header.shape != ShapeOf(geometry)) {
    return InvalidArgument("the sequence is from a pool with another spec: " + Quoted(header.shape) +
                           ", this pool has " + Quoted(ShapeOf(geometry)) + ": make both pools with one spec");
  }
  if (header.fingerprint != fingerprint) {
    return InvalidArgument("the sequence has the fingerprint " + Quoted(header.fingerprint) + ", wanted " +
                           Quoted(fingerprint) + ": both processes must run the same model");
  }
  if (header.tokens > geometry.max_seq_len) {
    return InvalidArgument("the sequence has " + Number(header.tokens) + " tokens, this pool's max_seq_len is " +
                           Number(geometry.max_seq_len));
  }
  if (header.block_bytes != geometry.block_bytes || header.ranges != geometry.num_ranges() ||
      header.blocks != geometry.BlocksFor(header.tokens)) {
    return Damaged("its header says " + Number(header.blocks) + " blocks of " + Number(header.block_bytes) +
                   " bytes in " + Number(header.ranges) + " ranges for " + Number(header.tokens) + " tokens");
  }
  return {};
}

}  // namespace kvpage::handover
