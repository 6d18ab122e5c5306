// EXPECT_OK(status), ASSERT_OK(status): GoogleTest assertions that a Status is ok, which print its message if it is
// not.
#ifndef KVPAGE_TESTS_EXPECT_OK_H_
#define KVPAGE_TESTS_EXPECT_OK_H_

#include <gtest/gtest.h>

#include "base/status.h"

namespace kvpage::testing {

inline ::testing::AssertionResult IsOk(const char* expression, const Status& status) {
  if (status.ok()) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << expression << " should be ok, but it is: " << status.message();
}

}  // namespace kvpage::testing

#define EXPECT_OK(expression) EXPECT_PRED_FORMAT1(::kvpage::testing::IsOk, expression)
#define ASSERT_OK(expression) ASSERT_PRED_FORMAT1(::kvpage::testing::IsOk, expression)

#endif  // KVPAGE_TESTS_EXPECT_OK_H_
