// The building blocks of random programs: cache values, slots with numbers, batches.
#ifndef KVPAGE_TESTS_CUDA_TWINS_VALUES_H_
#define KVPAGE_TESTS_CUDA_TWINS_VALUES_H_

#include <cstdint>
#include <random>
#include <vector>

namespace kvpage::testing {

using Rng = std::mt19937_64;

inline int Pick(Rng& rng, int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

struct Value {  // a cache value
  std::int32_t generation = 0;
  std::uint32_t epoch = 0;
  std::vector<std::int32_t> lengths;
};

struct Named {  // slots with a number each
  std::vector<std::int32_t> slots, numbers;
};

// A batch, possibly with several mistakes.
struct Ragged {
  std::vector<std::int32_t> slots, offsets;
  std::int64_t num_tokens = 0;
};

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_CUDA_TWINS_VALUES_H_
