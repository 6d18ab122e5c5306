// Helpers for kernel tests: random ragged batches, a reference in double precision, a thread pool.
#ifndef KVPAGE_TESTS_KERNELS_UTIL_H_
#define KVPAGE_TESTS_KERNELS_UTIL_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "base/dtype.h"
#include "base/parallel.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"
#include "tests/kernels_cache.h"
#include "tests/kernels_elements.h"

namespace kvpage::testing {

// Dtypes of queries, and dtypes in which keys and values are stored.
inline constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
inline constexpr DType kStored[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kI8, DType::kF8E4M3};

// One test problem: shapes, options, queries, and the keys and values of every sequence.
struct Problem {
  int kv_heads = 1, group = 1, head_dim = 64, num_tokens = 0;
  DType dtype = DType::kF32, q_dtype = DType::kF32;
  float scale = 1.0f, soft_cap = 0.0f;
  int window = 0;
  bool exact_weights = false;
  std::vector<float> sinks, slopes;
  std::vector<std::int32_t> limits;  // the last visible position of each new token; empty: causal
  std::vector<Sequence> sequences;
  std::vector<char> q;
  std::vector<std::vector<float>> contexts;  // per sequence: [K|V, tokens, kv_heads, head_dim]
  // Per output element, set by Reference: sum of weight * |value - output|, or weight * |value| for quantized values.
  std::vector<double> spread;

  int q_heads() const { return kv_heads * group; }
  int tokens(std::size_t s) const { return sequences[s].position + sequences[s].query_length; }
  int max_tokens() const {
    int longest = 1;
    for (std::size_t s = 0; s < sequences.size(); ++s) longest = std::max(longest, tokens(s));
    return longest;
  }
  double Query(int token, int head, int d) const {
    return Read(&q[((static_cast<std::int64_t>(token) * q_heads() + head) * head_dim + d) * ItemSize(q_dtype)],
                q_dtype);
  }
  float& At(int s, int which, int token, int head, int d) {
    return contexts[s][((static_cast<std::int64_t>(which) * tokens(s) + token) * kv_heads + head) * head_dim + d];
  }
};

// Describes the instruction set and the problem in messages.
inline std::string Describe(const Problem& p) {
  std::ostringstream text;
  text << cpu::InstructionSet() << " heads " << p.kv_heads << "x" << p.group << " dim " << p.head_dim << " "
       << Name(p.dtype) << " q " << Name(p.q_dtype) << " window " << p.window << " cap " << p.soft_cap << " sinks "
       << !p.sinks.empty() << " exact " << p.exact_weights << " alibi " << !p.slopes.empty() << " lengths";
  for (const Sequence& s : p.sequences) text << " " << s.position << "+" << s.query_length;
  return text.str();
}

// lengths: {tokens before, new tokens} of every sequence.
inline void FillProblem(Rng& rng, Problem& p, const std::vector<std::pair<int, int>>& lengths, int gap) {
  std::normal_distribution<float> normal;
  int at = 0;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    at += gap;
    p.sequences.push_back({static_cast<std::int32_t>(s), at, lengths[s].second, lengths[s].first});
    at += lengths[s].second;
  }
  p.num_tokens = at + gap;
  p.q.resize(static_cast<std::size_t>(p.num_tokens) * p.q_heads() * p.head_dim * ItemSize(p.q_dtype));
  for (std::size_t i = 0; i < p.q.size(); i += ItemSize(p.q_dtype)) Write(&p.q[i], p.q_dtype, normal(rng));
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    p.contexts.emplace_back(2 * static_cast<std::size_t>(p.tokens(s)) * p.kv_heads * p.head_dim);
    for (float& x : p.contexts.back()) x = normal(rng);
  }
  p.scale = 1.0f / std::sqrt(static_cast<float>(p.head_dim));
}

inline void Store(Problem& p, const Cache& cache, const std::vector<int>& slots) {
  for (std::size_t s = 0; s < slots.size(); ++s) {
    for (int which = 0; which < 2; ++which) {
      for (int t = 0; t < p.tokens(s); ++t) {
        for (int h = 0; h < p.kv_heads; ++h) {
          if (IsQuantized(p.dtype)) {
            *cache.ScaleAt(slots[s], t, which, h) =
                QuantizeRow(cache.At(slots[s], t, which, h), p.dtype, &p.At(s, which, t, h, 0), p.head_dim);
            continue;
          }
          for (int d = 0; d < p.head_dim; ++d) {
            Write(cache.At(slots[s], t, which, h, d), p.dtype, p.At(s, which, t, h, d));
          }
        }
      }
    }
  }
}

struct Result {
  std::vector<char> out;
  std::vector<float> lse;
  bool operator==(const Result& o) const {
    return out == o.out && std::memcmp(lse.data(), o.lse.data(), lse.size() * 4) == 0 && lse.size() == o.lse.size();
  }
};

// The result points into the problem.
inline AttentionOptions ToOptions(const Problem& p) {
  AttentionOptions options;
  options.sliding_window = &p.window;
  options.sinks = p.sinks.empty() ? nullptr : p.sinks.data();
  options.alibi_slopes = p.slopes.empty() ? nullptr : p.slopes.data();
  options.scale = p.scale;
  options.soft_cap = p.soft_cap;
  options.exact_weights = p.exact_weights;
  return options;
}

// Runs on the cache, with sequence s in slots[s]; `only` keeps one sequence. `prefixes`: see AttentionArgs.
inline Result RunAttention(const Problem& p, const Cache& cache, const std::vector<int>& slots, Parallel& parallel,
                           int only = -1, const SharedPrefixes* prefixes = nullptr) {
  Result result;
  result.out.assign(p.q.size(), '\x55');
  result.lse.assign(static_cast<std::size_t>(p.num_tokens) * p.q_heads(), 12345.0f);
  std::vector<Sequence> sequences;
  for (std::size_t s = 0; s < slots.size(); ++s) {
    if (only >= 0 && only != static_cast<int>(s)) continue;
    sequences.push_back(p.sequences[s]);
    sequences.back().slot = slots[s];
  }
  cpu::AttentionArgs args;
  args.kv = cache.view;
  args.layer = cache.layer;
  args.q = p.q.data();
  args.q_dtype = p.q_dtype;
  args.out = result.out.data();
  args.lse = result.lse.data();
  args.num_tokens = p.num_tokens;
  args.num_q_heads = p.q_heads();
  args.sequences = &sequences;
  args.prefixes = prefixes;
  args.limits = p.limits.empty() ? nullptr : p.limits.data();
  args.options = ToOptions(p);
  if (!cpu::Attend(args, parallel).ok()) result.out.clear();
  return result;
}

// Computes in double precision from the keys and values as stored: [num_tokens, q_heads, head_dim] and lse.
inline void Reference(Problem& p, std::vector<double>* out, std::vector<double>* lse) {
  out->assign(static_cast<std::size_t>(p.num_tokens) * p.q_heads() * p.head_dim, 0.0);
  lse->assign(static_cast<std::size_t>(p.num_tokens) * p.q_heads(), -std::numeric_limits<double>::infinity());
  p.spread.assign(out->size(), 0.0);
  for (std::size_t s = 0; s < p.sequences.size(); ++s) {
    std::vector<double> stored(p.contexts[s].size());
    std::vector<char> quantized_row(p.head_dim);
    for (std::size_t i = 0; IsQuantized(p.dtype) && i < stored.size(); i += p.head_dim) {
      const double scale = QuantizeRow(quantized_row.data(), p.dtype, &p.contexts[s][i], p.head_dim);
      for (int d = 0; d < p.head_dim; ++d) stored[i + d] = Read(&quantized_row[d], p.dtype) * scale;
    }
    for (std::size_t i = 0; !IsQuantized(p.dtype) && i < stored.size(); ++i) {
      char element[4];
      Write(element, p.dtype, p.contexts[s][i]);
      stored[i] = Read(element, p.dtype);
    }
    const auto row = [&](int which, int t, int h) {
      return &stored[((static_cast<std::int64_t>(which) * p.tokens(s) + t) * p.kv_heads + h) * p.head_dim];
    };
    for (int i = 0; i < p.sequences[s].query_length; ++i) {
      const int token = p.sequences[s].query_begin + i;
      const int position = p.limits.empty() ? p.sequences[s].position + i : p.limits[token];
      const int from = p.window > 0 ? std::max(0, position - p.window + 1) : 0;
      for (int head = 0; head < p.q_heads(); ++head) {
        std::vector<double> query(p.head_dim), scores;
        for (int d = 0; d < p.head_dim; ++d) query[d] = p.Query(token, head, d);
        for (int t = from; t <= position; ++t) {
          const double* key = row(0, t, head / p.group);
          double x = 0;
          for (int d = 0; d < p.head_dim; ++d) x += query[d] * key[d];
          x *= static_cast<double>(p.scale);
          if (p.soft_cap > 0) x = p.soft_cap * std::tanh(x / p.soft_cap);
          if (!p.slopes.empty()) x += static_cast<double>(p.slopes[head]) * (t - position);
          scores.push_back(x);
        }
        double top = *std::max_element(scores.begin(), scores.end());
        if (!p.sinks.empty()) top = std::max(top, static_cast<double>(p.sinks[head]));
        double sum = p.sinks.empty() ? 0.0 : std::exp(p.sinks[head] - top);
        for (double& x : scores) sum += x = std::exp(x - top);
        const std::int64_t at = (static_cast<std::int64_t>(token) * p.q_heads() + head) * p.head_dim;
        double* o = &(*out)[at];
        for (std::size_t k = 0; k < scores.size(); ++k) {
          const double* value = row(1, from + static_cast<int>(k), head / p.group);
          for (int d = 0; d < p.head_dim; ++d) o[d] += scores[k] / sum * value[d];
        }
        for (std::size_t k = 0; k < scores.size(); ++k) {
          const double* value = row(1, from + static_cast<int>(k), head / p.group);
          for (int d = 0; d < p.head_dim; ++d) {
            p.spread[at + d] += scores[k] / sum * std::fabs(value[d] - (IsQuantized(p.dtype) ? 0.0 : o[d]));
          }
        }
        (*lse)[static_cast<std::int64_t>(token) * p.q_heads() + head] = top + std::log(sum);
      }
    }
  }
}

// Hands tasks to threads in an order on which no kernel should depend.
class Threads final : public Parallel {
 public:
  explicit Threads(int count) : count_(count) {}
  int num_workers() const override { return count_; }
  void For(std::int64_t num_tasks, const std::function<void(std::int64_t, int)>& fn) override {
    std::vector<std::thread> threads;
    std::atomic<std::int64_t> next{0};
    for (int worker = 0; worker < count_; ++worker) {
      threads.emplace_back([&, worker] {
        for (std::int64_t i; (i = next.fetch_add(1)) < num_tasks;) fn(num_tasks - 1 - i, worker);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  int count_;
};

inline std::vector<const char*> InstructionSets() {
  std::vector<const char*> names;
  for (const char* name : {"baseline", "avx2", "avx512", "avx512_bf16"}) {
    if (cpu::ForceInstructionSet(name) != nullptr) names.push_back(name);
  }
  return names;
}

inline std::vector<int> Slots(std::size_t n) {
  std::vector<int> slots(n);
  std::iota(slots.begin(), slots.end(), 0);
  return slots;
}

// Makes a cache of any layout, with room for one sequence more than the problem has. With `apart`, also a layout with
// values apart from their keys, which the CUDA kernels do not read.
inline Cache RandomCache(Rng& rng, const Problem& p, bool apart = false) {
  const Layout layout =
      static_cast<Layout>(Pick(rng, 0, static_cast<int>(apart ? Layout::kTableApart : Layout::kTableHnd)));
  const bool table = HasTable(layout);
  const int chunk = table ? PickOf(rng, {1, 3, 16, 100}) : 16 * Pick(rng, 1, 8);
  return Cache(rng, layout, p.dtype, p.kv_heads, p.head_dim, static_cast<int>(p.sequences.size()) + 1,
               p.max_tokens() + 5, chunk);
}

// Stores the problem in some slots of such a cache, and returns the slots.
inline std::vector<int> StoreAnywhere(Rng& rng, Problem& p, const Cache& cache) {
  std::vector<int> slots = Slots(p.sequences.size() + 1);
  std::shuffle(slots.begin(), slots.end(), rng);
  slots.pop_back();
  Store(p, cache, slots);
  return slots;
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_KERNELS_UTIL_H_
