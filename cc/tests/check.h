// A test framework of three macros: every C++ test is a plain executable that returns the number of failures.
//
//   TEST(Name) { CHECK(x > 0); CHECK_EQ(a, b); CHECK_OK(status) << "while mapping"; }
//   int main() { return kvpage::testing::RunAll(); }
//
// A failed check prints file, line, values and what was streamed into it; the test goes on.
#ifndef KVPAGE_TESTS_CHECK_H_
#define KVPAGE_TESTS_CHECK_H_

#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"

namespace kvpage::testing {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& Cases() {
  static std::vector<Case> cases;
  return cases;
}

inline int& Failures() {
  static int failures = 0;
  return failures;
}

struct Registration {
  Registration(const char* name, void (*run)()) { Cases().push_back({name, run}); }
};

// Prints when it goes out of scope, so that the check may be followed by << details.
class Failure {
 public:
  Failure(const char* file, int line, const std::string& what) { text_ << file << ":" << line << ": " << what; }
  ~Failure() {
    ++Failures();
    std::fprintf(stderr, "%s\n", text_.str().c_str());
  }
  template <class T>
  Failure& operator<<(const T& value) {
    text_ << " " << value;
    return *this;
  }

 private:
  std::ostringstream text_;
};

inline bool IsOk(const Status& status, std::string* message) {
  *message = status.message();
  return status.ok();
}

// Runs every test, or those whose name contains the first argument.
inline int RunAll(int argc = 0, char** argv = nullptr) {
  for (const Case& test : Cases()) {
    if (argc > 1 && std::string(test.name).find(argv[1]) == std::string::npos) continue;
    const int before = Failures();
    try {
      test.run();
    } catch (const std::exception& e) {
      Failure(test.name, 0, std::string("threw ") + e.what());
    }
    std::fprintf(stderr, "%s %s\n", Failures() == before ? "[ ok ]" : "[FAIL]", test.name);
  }
  return Failures() == 0 ? 0 : 1;
}

}  // namespace kvpage::testing

#define TEST(name)                                                                      \
  static void Test##name();                                                             \
  static const ::kvpage::testing::Registration registration_##name(#name, &Test##name); \
  static void Test##name()

#define CHECK(condition) \
  if (condition) {       \
  } else                 \
    ::kvpage::testing::Failure(__FILE__, __LINE__, "wanted " #condition)

#define CHECK_EQ(a, b)                                             \
  if (const auto& [_a, _b] = std::make_pair((a), (b)); _a == _b) { \
  } else                                                           \
    ::kvpage::testing::Failure(__FILE__, __LINE__, "wanted " #a " == " #b ", got") << _a << "and" << _b << ""

#define CHECK_OK(expr)                                                    \
  if (std::string _message; ::kvpage::testing::IsOk((expr), &_message)) { \
  } else                                                                  \
    ::kvpage::testing::Failure(__FILE__, __LINE__, "wanted " #expr " to be ok, got") << _message

#endif  // KVPAGE_TESTS_CHECK_H_
