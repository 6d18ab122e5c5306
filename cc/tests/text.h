// Token ids of prompts.
#ifndef KVPAGE_TESTS_TEXT_H_
#define KVPAGE_TESTS_TEXT_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvpage::testing {

// Returns `blocks` full blocks of 16 times one token id, and one more token.
inline std::vector<std::int32_t> Text(std::int32_t token, std::int64_t blocks) {
  return std::vector<std::int32_t>(static_cast<std::size_t>(16 * blocks + 1), token);
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_TEXT_H_
