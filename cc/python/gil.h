// Releasing and taking the GIL in threads that may be daemon threads.
//
// Python 3.11 to 3.13 end a daemon thread that requests the GIL after the interpreter has begun to finalize: its stack
// is unwound, and a destructor or nanobind's `noexcept` frames on it abort the process. Here, such a thread stops
// instead, as in Python 3.14, and ends with the process.
#ifndef KVPAGE_PYTHON_GIL_H_
#define KVPAGE_PYTHON_GIL_H_

#include <Python.h>
#include <unistd.h>

namespace kvpage {

// Takes the GIL. No lock may be held, because others wait for locks while holding the GIL.
inline void TakeGil(PyThreadState* thread) noexcept {
  try {
    PyEval_RestoreThread(thread);
  } catch (...) {  // the unwinding of pthread_exit, which would continue after this handler: it never returns
    while (true) pause();
  }
}

// Releases the GIL while it exists.
class GilRelease {
 public:
  GilRelease() : thread_(PyEval_SaveThread()) {}
  ~GilRelease() { TakeGil(thread_); }
  // Takes the GIL to run Python's signal handlers; returns false if one of them has raised, with the error set.
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
