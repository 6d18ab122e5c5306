// How often a random test of emulated kernels, which takes long under sanitizers, tries another case.
#ifndef KVPAGE_TESTS_ROUNDS_H_
#define KVPAGE_TESTS_ROUNDS_H_

#include <cstdlib>

namespace kvpage::testing {

// `all` where KVPAGE_EXHAUSTIVE is in the environment (.ci/run --full), else the first half of them.
inline int Rounds(int all) { return std::getenv("KVPAGE_EXHAUSTIVE") != nullptr ? all : (all + 1) / 2; }

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_ROUNDS_H_
