#include "cache/process.h"

#include <pthread.h>

#include <atomic>

namespace kvpage {
namespace {

std::atomic<int> g_fork_count{0};

[[maybe_unused]] const int g_fork_hook =
    pthread_atfork([] { RegistryMutex().lock(); }, [] { RegistryMutex().unlock(); },
                   [] {
                     g_fork_count.fetch_add(1);
                     RegistryMutex().unlock();
                   });

}  // namespace

int ForkCount() { return g_fork_count.load(); }

std::mutex& RegistryMutex() {
  static std::mutex* const mutex = new std::mutex;
  return *mutex;
}

}  // namespace kvpage
