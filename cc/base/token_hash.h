// Hashes of token sequences, block by block: the hash of a prefix is computed from the hash of the prefix without its
// last block and from that block's tokens. Hashes only find candidates (the index compares tokens) and name prefixes in
// events and in the state of eviction policies. They are the same in all processes.
#ifndef KVPAGE_BASE_TOKEN_HASH_H_
#define KVPAGE_BASE_TOKEN_HASH_H_

#include <cstdint>
#include <cstring>
#include <string>

namespace kvpage {

// Multiplies to 128 bits and folds the result (the mixing step of wyhash and rapidhash).
inline std::uint64_t MixHash(std::uint64_t a, std::uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

// The hash of a prefix whose last block has these bytes and follows the prefix with hash `parent`. The part that does
// not depend on `parent` is computed first, so that a processor can hash several blocks of a chain at once.
inline std::uint64_t HashBytes(std::uint64_t parent, const void* data, std::size_t size) {
  constexpr std::uint64_t kA = 0xa0761d6478bd642f, kB = 0xe7037ed1a0b428db, kC = 0x8ebc6af09c88c6e3;
  const unsigned char* bytes = static_cast<const unsigned char*>(data);
  constexpr std::size_t kStep = 2 * sizeof(std::uint64_t);
  std::uint64_t content = kC ^ size, words[2];
  for (; size >= kStep; size -= kStep, bytes += kStep) {
    std::memcpy(words, bytes, kStep);
    content = MixHash(content ^ words[0] ^ kA, words[1] ^ kB) + content;
  }
  words[0] = words[1] = 0;
  std::memcpy(words, bytes, size);
  content = MixHash(content ^ words[0] ^ kA, words[1] ^ kB);
  return MixHash(parent ^ kB, content ^ kC);
}

inline std::uint64_t HashTokens(std::uint64_t parent, const std::int32_t* tokens, std::int64_t count) {
  return HashBytes(parent, tokens, count * sizeof(*tokens));
}

inline std::uint64_t HashName(const std::string& name) { return HashBytes(0, name.data(), name.size()); }

}  // namespace kvpage

#endif  // KVPAGE_BASE_TOKEN_HASH_H_
