// The read floor of decode attention: how fast these cores read memory.
//
// All threads read a buffer piece by piece (a piece is what one attention call reads), each its own share of a piece,
// and synchronise after every piece as the threads of a kernel do. There are three loops; the caller takes the fastest.
#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

using Vector = std::uint64_t __attribute__((vector_size(64)));
constexpr std::size_t kLine = 64;

// One stream, four lines a step, prefetched `ahead` bytes before they are needed.
Vector ReadAhead(const char* data, std::size_t bytes, std::size_t ahead) {
  Vector a{}, b{}, c{}, d{};
  for (std::size_t i = 0; i + 4 * kLine <= bytes; i += 4 * kLine) {
    for (std::size_t line = 0; line < 4; ++line) _mm_prefetch(data + i + ahead + line * kLine, _MM_HINT_T0);
    const Vector* v = reinterpret_cast<const Vector*>(data + i);
    a ^= v[0];
    b ^= v[1];
    c ^= v[2];
    d ^= v[3];
  }
  return a ^ b ^ c ^ d;
}

// Four streams, a quarter of the share each.
Vector ReadStreams(const char* data, std::size_t bytes, std::size_t ahead) {
  Vector sum[4] = {};
  const std::size_t quarter = bytes / 4 / (2 * kLine) * (2 * kLine);
  for (std::size_t i = 0; i < quarter; i += 2 * kLine) {
    for (std::size_t s = 0; s < 4; ++s) {
      const char* at = data + s * quarter + i;
      _mm_prefetch(at + ahead, _MM_HINT_T0);
      _mm_prefetch(at + ahead + kLine, _MM_HINT_T0);
      const Vector* v = reinterpret_cast<const Vector*>(at);
      sum[s] ^= v[0] ^ v[1];
    }
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ ReadAhead(data + 4 * quarter, bytes - 4 * quarter, 0);
}

Vector Read(int loop, const char* data, std::size_t bytes) {
  if (loop == 0) return ReadAhead(data, bytes, 1024);
  if (loop == 1) return ReadAhead(data, bytes, 4096);
  return ReadStreams(data, bytes, 1024);
}

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void Meet() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins > 10000) sched_yield();
    }
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<int> round_{0};
};

}  // namespace

// Reads `bytes` of `data` (64-byte aligned) `passes` times in pieces; writes the seconds of each pass.
extern "C" std::uint64_t read_passes(const char* data, std::size_t bytes, std::size_t piece, int threads, int loop,
                                     int passes, double* seconds) {
  Barrier barrier(threads);
  std::atomic<std::uint64_t> result{0};
  const auto work = [&](int me) {
    Vector sum{};
    for (int pass = 0; pass < passes; ++pass) {
      barrier.Meet();
      const auto begin = std::chrono::steady_clock::now();
      for (std::size_t at = 0; at + piece <= bytes; at += piece) {
        const std::size_t share = piece / threads / (4 * kLine) * (4 * kLine);
        sum ^= Read(loop, data + at + me * share, me == threads - 1 ? piece - me * share : share);
        barrier.Meet();
      }
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
      if (me == 0) seconds[pass] = spent.count();
    }
    result += sum[0] ^ sum[7];
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
  return result;
}
