// Watchdog: a limit on the processor time of a launch, so that a kernel that never ends fails instead of hanging.
//
// Threads that only poll are detected by counting (kIdleRounds). For threads that keep passing barriers or that compute
// forever, only the time limit helps.
#ifndef KVPAGE_TESTING_CUDA_EMULATION_WATCHDOG_H_
#define KVPAGE_TESTING_CUDA_EMULATION_WATCHDOG_H_

#include <signal.h>
#include <time.h>

#include "testing/cuda_emulation/block.h"

namespace kvpage::emulation {

// While it exists, the calling thread may use `seconds` of processor time. One at a time.
class Watchdog {
 public:
  explicit Watchdog(double seconds) {
    late() = 0;
    struct sigaction action = {};
    action.sa_handler = &Watchdog::OnSignal;
    action.sa_flags = SA_RESTART;
    sigaction(SIGXCPU, &action, &before_);
    sigevent event = {};
    event.sigev_notify = SIGEV_SIGNAL;
    event.sigev_signo = SIGXCPU;
    armed_ = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_) == 0;
    const auto whole = static_cast<time_t>(seconds);
    const timespec limit = {whole, static_cast<long>((seconds - static_cast<double>(whole)) * 1e9)};
    const itimerspec times = {/*it_interval=*/limit, /*it_value=*/limit};
    if (armed_) timer_settime(timer_, 0, &times, nullptr);
  }
  ~Watchdog() {
    if (armed_) timer_delete(timer_);
    sigaction(SIGXCPU, &before_, nullptr);
  }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  // Called by the scheduler between two threads: ends the process with a message if the limit was reached.
  void Look() const {
    if (late() != 0) FailStuck("the kernel does not end (Device::launch_seconds)");
  }

 private:
  static volatile sig_atomic_t& late() {
    static volatile sig_atomic_t late = 0;
    return late;
  }
  // The scheduler has the better message. If it does not run again, the next signal ends the process.
  static void OnSignal(int) {
    if (late() != 0) Fail("the kernel does not end (Device::launch_seconds), and this thread does not wait for others");
    late() = 1;
  }

  timer_t timer_ = {};
  bool armed_ = false;
  struct sigaction before_ = {};
};

}  // namespace kvpage::emulation

#endif  // KVPAGE_TESTING_CUDA_EMULATION_WATCHDOG_H_
