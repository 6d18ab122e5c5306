#include "store/file_header.h"

#include <charconv>
#include <cstdio>
#include <cstring>

#include "base/token_hash.h"
#include "crc32c/crc32c.h"

namespace kvpage::store {
namespace {

constexpr char kFormat[] = "jax_kvpage.blocks";
constexpr char kVersionNumber[] = "1";

std::string Hex(std::uint64_t value, int digits) {
  char text[17];
  std::snprintf(text, sizeof text, "%0*llx", digits, static_cast<unsigned long long>(value));
  return text;
}

std::string Quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += "\\u00" + Hex(static_cast<unsigned char>(c), 2);
    } else {
      out += c;
    }
  }
  return out + '"';
}

// Reads what EncodeHeader writes. It need not handle other valid JSON: a decoded header is encoded again and compared.
class Scanner {
 public:
  explicit Scanner(const std::string& text, std::size_t begin) : at_(text.data() + begin), end_(&text.back() + 1) {}

  bool Literal(const char* expected) {
    const std::size_t size = std::strlen(expected);
    if (static_cast<std::size_t>(end_ - at_) < size || std::memcmp(at_, expected, size) != 0) return false;
    at_ += size;
    return true;
  }
  bool String(std::string* out) {
    if (!Literal("\"")) return false;
    out->clear();
    while (at_ < end_ && *at_ != '"') {
      int code = 0;
      if (*at_ != '\\') {
        *out += *at_++;
      } else if (end_ - at_ > 6 && at_[1] == 'u') {
        if (std::from_chars(at_ + 4, at_ + 6, code, 16).ptr != at_ + 6) return false;
        *out += static_cast<char>(code);
        at_ += 6;
      } else {
        if (end_ - at_ < 2) return false;
        *out += at_[1];
        at_ += 2;
      }
    }
    return Literal("\"");
  }
  bool Pair(const char* key, std::string* out) { return Literal(Quoted(key).c_str()) && Literal(":") && String(out); }
  bool Pair(const char* key, std::int64_t* out) {
    std::string text;
    if (!Pair(key, &text)) return false;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *out);
    return error == std::errc() && end == text.data() + text.size();
  }
  // Numbers separated by spaces.
  template <class Number>
  bool Pair(const char* key, int base, std::vector<Number>* out) {
    std::string text;
    if (!Pair(key, &text)) return false;
    const char* at = text.data();
    const char* const end = at + text.size();
    while (at < end) {
      Number number = 0;
      const auto [next, error] = std::from_chars(at, end, number, base);
      if (error != std::errc()) return false;
      out->push_back(number);
      at = next;
      if (at < end && *at++ != ' ') return false;
    }
    return true;
  }

 private:
  const char* at_;
  const char* const end_;
};

// The members of the metadata object except the last one, which is their checksum.
std::string Metadata(const FileHeader& header) {
  const Identity& identity = header.identity;
  const BlockShape& shape = identity.shape;
  std::string text;
  const auto add = [&](const char* key, const std::string& value) { text += Quoted(key) + ":" + Quoted(value) + ","; };
  add("format", kFormat);
  add("version", kVersionNumber);
  add("layout", shape.layout);
  add("block_tokens", std::to_string(shape.block_tokens));
  add("ranges", std::to_string(shape.ranges));
  add("block_bytes", std::to_string(shape.block_bytes));
  add("fingerprint", identity.fingerprint);
  add("namespace", identity.space);
  add("first_block", std::to_string(header.first_block));
  add("parent", Hex(HashPrefix(identity, header.tokens.data(), header.first_block), 16));
  std::string numbers;
  for (const std::int32_t token : header.tokens) (numbers += std::to_string(token)) += ' ';
  if (!numbers.empty()) numbers.pop_back();
  add("tokens", numbers);
  numbers.clear();
  for (const std::uint32_t checksum : header.checksums) (numbers += Hex(checksum, 8)) += ' ';
  if (!numbers.empty()) numbers.pop_back();
  add("crc32c", numbers);
  return text;
}

bool Valid(const FileHeader& header) {
  const BlockShape& shape = header.identity.shape;
  constexpr std::int64_t kMost = std::int64_t{1} << 40;
  for (const std::int64_t value : {shape.block_tokens, shape.ranges, shape.block_bytes, header.blocks()}) {
    if (value < 1 || value > kMost) return false;
  }
  std::int64_t bytes = shape.block_bytes;
  if (__builtin_mul_overflow(bytes, shape.ranges, &bytes) || __builtin_mul_overflow(bytes, header.blocks(), &bytes) ||
      bytes > kMost) {
    return false;
  }
  const auto tokens = static_cast<std::int64_t>(header.tokens.size());
  return header.first_block >= 0 && header.first_block <= tokens && tokens % shape.block_tokens == 0 &&
         tokens / shape.block_tokens == header.first_block + header.blocks();
}

}  // namespace

const char kSuffix[] = ".kv.safetensors";

const char* Name(Problem problem) {
  constexpr const char* kNames[kNumProblems] = {"none",     "damaged",    "truncated", "version", "fingerprint",
                                                "geometry", "unreadable", "gone",      "closed"};
  return kNames[static_cast<int>(problem)];
}

std::uint64_t HashIdentity(const Identity& identity) {
  const BlockShape& shape = identity.shape;
  const std::int64_t numbers[] = {shape.block_tokens, shape.ranges, shape.block_bytes};
  std::uint64_t hash = HashBytes(0, numbers, sizeof numbers);
  for (const std::string* text : {&shape.layout, &identity.fingerprint, &identity.space}) {
    hash = HashBytes(hash, text->data(), text->size());
  }
  return hash;
}

std::uint64_t HashPrefix(const Identity& identity, const std::int32_t* tokens, std::int64_t blocks) {
  const std::int64_t block_tokens = identity.shape.block_tokens;
  std::uint64_t hash = HashIdentity(identity);
  for (std::int64_t i = 0; i < blocks; ++i) hash = HashTokens(hash, tokens + i * block_tokens, block_tokens);
  return hash;
}

std::string EncodeHeader(const FileHeader& header) {
  const BlockShape& shape = header.identity.shape;
  std::string metadata = Metadata(header);
  const std::uint32_t checksum = crc32c::Crc32c(metadata);
  metadata += "\"metadata_crc32c\":\"" + Hex(checksum, 8) + "\"";
  std::string text = "{\"__metadata__\":{" + metadata + "},\"blocks\":{\"dtype\":\"U8\",\"shape\":[" +
                     std::to_string(header.blocks()) + "," + std::to_string(shape.ranges) + "," +
                     std::to_string(shape.block_bytes) + "],\"data_offsets\":[0," +
                     std::to_string(header.data_bytes()) + "]}}";
  const std::uint64_t prefix = sizeof(std::uint64_t);
  const std::uint64_t whole = (prefix + text.size() + kDataAlignment - 1) / kDataAlignment * kDataAlignment;
  const std::uint64_t size = whole - prefix;
  text.resize(size, ' ');
  std::string bytes(prefix, '\0');
  for (std::size_t i = 0; i < prefix; ++i) bytes[i] = static_cast<char>(size >> (8 * i));  // little-endian
  return bytes + text;
}

Problem DecodeHeader(const std::string& bytes, FileHeader* out) {
  if (bytes.size() <= sizeof(std::uint64_t)) return Problem::kTruncated;
  FileHeader header;
  Identity& identity = header.identity;
  BlockShape& shape = identity.shape;
  Scanner scanner(bytes, sizeof(std::uint64_t));
  std::string format, version, unchecked;
  if (!scanner.Literal("{\"__metadata__\":{") || !scanner.Pair("format", &format)) return Problem::kDamaged;
  if (!scanner.Literal(",") || !scanner.Pair("version", &version)) return Problem::kDamaged;
  if (format != kFormat || version != kVersionNumber) return Problem::kVersion;
  const bool ok = scanner.Literal(",") && scanner.Pair("layout", &shape.layout) && scanner.Literal(",") &&
                  scanner.Pair("block_tokens", &shape.block_tokens) && scanner.Literal(",") &&
                  scanner.Pair("ranges", &shape.ranges) && scanner.Literal(",") &&
                  scanner.Pair("block_bytes", &shape.block_bytes) && scanner.Literal(",") &&
                  scanner.Pair("fingerprint", &identity.fingerprint) && scanner.Literal(",") &&
                  scanner.Pair("namespace", &identity.space) && scanner.Literal(",") &&
                  scanner.Pair("first_block", &header.first_block) && scanner.Literal(",") &&
                  scanner.Pair("parent", &unchecked) && scanner.Literal(",") &&
                  scanner.Pair("tokens", 10, &header.tokens) && scanner.Literal(",") &&
                  scanner.Pair("crc32c", 16, &header.checksums);
  if (!ok || !Valid(header) || EncodeHeader(header) != bytes) return Problem::kDamaged;
  *out = std::move(header);
  return Problem::kNone;
}

std::string FileName(const FileHeader& header) {
  const std::int64_t end = header.first_block + header.blocks();
  const std::uint64_t hash = HashPrefix(header.identity, header.tokens.data(), end);
  return Hex(hash, 16) + "-" + std::to_string(header.first_block) + kSuffix;
}

}  // namespace kvpage::store
