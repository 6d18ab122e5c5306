// The number of cases in a random test of emulated kernels, which takes long under sanitizers.
#ifndef KVPAGE_TESTS_ROUNDS_H_
#define KVPAGE_TESTS_ROUNDS_H_

#include <cstdlib>

namespace kvpage::testing {

// `all` if KVPAGE_EXHAUSTIVE is in the environment (.ci/run --full), otherwise the first half.
inline int Rounds(int all) { return std::getenv("KVPAGE_EXHAUSTIVE") != nullptr ? all : (all + 1) / 2; }

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_ROUNDS_H_
