// The GIL, given up for a while by a thread that may be a daemon's.
//
// Python 3.11 to 3.13 end a daemon thread that wants the GIL after the interpreter has begun to finalize: its stack is
// unwound, and a destructor or nanobind's `noexcept` frames on it abort the process. Such a thread stops here instead,
// as Python 3.14 lets it, and ends with the process.
#ifndef KVPAGE_PYTHON_GIL_H_
#define KVPAGE_PYTHON_GIL_H_

#include <Python.h>
#include <unistd.h>

namespace kvpage {

// Takes the GIL. No lock may be held: others wait for it with the GIL in their hands.
inline void TakeGil(PyThreadState* thread) noexcept {
  try {
    PyEval_RestoreThread(thread);
  } catch (...) {  // the unwinding of pthread_exit, which ends when this handler does: never
    while (true) pause();
  }
}

// Gives up the GIL while it lives.
class GilRelease {
 public:
  GilRelease() : thread_(PyEval_SaveThread()) {}
  ~GilRelease() { TakeGil(thread_); }
  // Takes the GIL for Python's signal handlers; false: one of them has raised, and the error is set.
  bool CheckSignals() {
    TakeGil(thread_);
    const bool ok = PyErr_CheckSignals() == 0;
    thread_ = PyEval_SaveThread();
    return ok;
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* thread_;
};

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_GIL_H_
