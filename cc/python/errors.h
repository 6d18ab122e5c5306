// Statuses as Python exceptions: _native.StatusError carries (code, reason, message), and the Python side
// (jax_kvpage/_native_pool.py) converts it to the exception that callers see.
#ifndef KVPAGE_PYTHON_ERRORS_H_
#define KVPAGE_PYTHON_ERRORS_H_

#include <nanobind/nanobind.h>

#include <stdexcept>

#include "base/status.h"

namespace kvpage {

class StatusError : public std::runtime_error {
 public:
  explicit StatusError(const Status& status)
      : std::runtime_error(status.message()), code(status.code()), reason(status.reason()) {}
  Code code;
  Reason reason;
};

inline void Raise(const Status& status) {
  if (!status.ok()) throw StatusError(status);
}

// Adds Code, Reason and StatusError to the module.
void BindErrors(nanobind::module_& m);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_ERRORS_H_
