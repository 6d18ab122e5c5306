// Helpers for tests of sequences that share blocks: tokens that carry a stamp, and accounts that must add up.
#ifndef KVPAGE_TESTS_SHARING_UTIL_H_
#define KVPAGE_TESTS_SHARING_UTIL_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "tests/pool_util.h"

namespace kvpage::testing {

// Calls fn(float&) for the first element of the tokens' keys and values in every layer.
template <class Fn>
void ForTokens(Pool* pool, std::int32_t slot, std::int64_t begin, std::int64_t end, Fn&& fn) {
  const KVView view = pool->View();
  for (std::int64_t token = begin; token < end; ++token) {
    for (std::int64_t i = 0; i < 2 * pool->geometry().num_layers; ++i) {
      fn(*reinterpret_cast<float*>(view.At(slot, token, i / 2, i % 2, 0)), static_cast<float>(token));
    }
  }
}

// Writes `count` tokens that carry `stamp` and their position, and commits them.
inline void WriteStamped(Pool* pool, Program* program, std::int32_t slot, std::int32_t count, float stamp) {
  const std::int32_t length = program->length(slot);
  EXPECT_OK(pool->Extend({slot}, {length + count}).status);
  EXPECT_OK(program->Write(slot, count));
  ForTokens(pool, slot, length, length + count, [&](float& at, float token) { at = 1000 * stamp + token; });
  EXPECT_OK(pool->Commit(slot, std::vector<std::int32_t>(static_cast<std::size_t>(count), 7)));
}

inline std::int64_t CountStamped(Pool* pool, std::int32_t slot, std::int64_t begin, std::int64_t end, float stamp) {
  std::int64_t right = 0, all = 0;
  ForTokens(pool, slot, begin, end, [&](float& at, float token) {
    right += at == 1000 * stamp + token;
    ++all;
  });
  return all == right ? end - begin : -1;
}

inline bool AddsUp(Pool* pool) {
  const PoolNumbers n = pool->Numbers();
  return n.blocks_mapped + n.blocks_parked + n.blocks_draining + n.blocks_free == n.blocks_total;
}

inline SlotRow RowOf(Pool* pool, std::int32_t slot) {
  for (const SlotRow& row : pool->Rows()) {
    if (row.slot == slot) return row;
  }
  return {};
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_SHARING_UTIL_H_
