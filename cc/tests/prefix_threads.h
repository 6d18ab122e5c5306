// Threads that use a pool and its store concurrently.
#ifndef KVPAGE_TESTS_PREFIX_THREADS_H_
#define KVPAGE_TESTS_PREFIX_THREADS_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "cache/pool.h"
#include "tests/expect_ok.h"
#include "tests/text.h"

namespace kvpage::testing {

// Calls `run` with 200 texts while one thread prefetches such texts and another one evicts.
template <class Run>
void RunBesideThreads(Pool* pool, const Run& run) {
  std::atomic<bool> ended{false};
  std::vector<std::thread> threads;
  threads.emplace_back([&] {
    std::shared_ptr<prefix::FetchTicket> ticket, last;
    for (std::int32_t i = 0; !ended; ++i) {
      EXPECT_OK(pool->Prefetch({"", Text(1 + i % 9, 5), 0}, &ticket));
      static_cast<void>(ticket->Wait(0.002));
      // More than two slow reads at a time would hold all blocks.
      if (last != nullptr) {
        EXPECT_TRUE(last->Wait(60));
      }
      last = ticket;
    }
  });
  threads.emplace_back([&] {
    std::int64_t freed = 0;
    while (!ended) {
      EXPECT_OK(pool->Evict(4, &freed));
      EXPECT_OK(pool->Trim(&freed));
      usleep(500);
    }
  });
  for (std::int32_t i = 0; i < 200; ++i) run(Text(1 + i % 9, 3 + i % 3));
  ended = true;
  for (std::thread& thread : threads) thread.join();
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_PREFIX_THREADS_H_
