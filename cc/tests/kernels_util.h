// What the kernel tests share: caches of every layout with poisoned free memory, random ragged batches, a reference in
// double precision, a thread pool.
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
#include <string>
#include <thread>
#include <vector>

#include "base/dtype.h"
#include "base/parallel.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"

namespace kvpage::testing {

using Rng = std::mt19937_64;

inline int Pick(Rng& rng, int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }
template <class T>
T PickOf(Rng& rng, std::initializer_list<T> values) {
  return values.begin()[Pick(rng, 0, static_cast<int>(values.size()) - 1)];
}

// Elements of any dtype, one at a time, written independently of the kernels. Quantised ones without their scale.
inline double Read(const char* p, DType dtype) {
  if (dtype == DType::kF32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  if (dtype == DType::kI8) return static_cast<signed char>(*p);
  if (dtype == DType::kF8E4M3) {
    const int code = static_cast<unsigned char>(*p), exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 127) == 127) return std::numeric_limits<double>::quiet_NaN();
    const double size = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(mantissa + 8, exponent - 10);
    return code >= 128 ? -size : size;
  }
  std::uint16_t h;
  std::memcpy(&h, p, 2);
  const bool half = dtype == DType::kF16;
  const int exponent_bits = half ? 5 : 8, mantissa_bits = half ? 10 : 7;
  const int exponent = (h >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = h & ((1 << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = (h & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

// Rounds to nearest even.
inline void Write(char* p, DType dtype, float x) {
  if (dtype == DType::kF32) {
    std::memcpy(p, &x, 4);
    return;
  }
  const bool half = dtype == DType::kF16;
  const int mantissa_bits = half ? 10 : 7, bias = half ? 15 : 127, max_exponent = half ? 15 : 127;
  std::uint16_t h = std::signbit(x) ? 0x8000 : 0;
  const std::uint16_t infinity = static_cast<std::uint16_t>((2 * bias + 1) << mantissa_bits);
  if (std::isnan(x)) {
    h |= infinity | (1 << (mantissa_bits - 1));
  } else if (std::isinf(x)) {
    h |= infinity;
  } else if (x != 0) {
    int exponent;
    std::frexp(std::fabs(static_cast<double>(x)), &exponent);
    exponent = std::max(exponent - 1, 1 - bias);
    const double units = std::nearbyint(std::ldexp(std::fabs(static_cast<double>(x)), mantissa_bits - exponent));
    // The implicit bit carries into the exponent, and a mantissa that rounds up does too.
    const long bits = static_cast<long>(units) + (static_cast<long>(exponent + bias - 1) << mantissa_bits);
    h |= exponent > max_exponent || bits > infinity ? infinity : static_cast<std::uint16_t>(bits);
  }
  std::memcpy(p, &h, 2);
}

// A row of n elements as quantised storage keeps it; returns its scale. As jax_kvpage/quantize.py has it.
inline float QuantizeRow(char* p, DType dtype, const float* x, int n) {
  float amax = 0.0f;
  bool finite = true;
  for (int d = 0; d < n; ++d) {
    finite = finite && std::isfinite(x[d]);
    amax = std::max(amax, std::fabs(x[d]));
    p[d] = 0;
  }
  const float scale = amax * (1.0f / (dtype == DType::kI8 ? 127.0f : 448.0f));
  if (!finite) return std::nanf("");
  if (scale < std::numeric_limits<float>::min()) return 0.0f;
  const float inverse = 1.0f / scale;
  for (int d = 0; d < n; ++d) {
    const float y = x[d] * inverse;
    if (dtype == DType::kI8) {
      p[d] = static_cast<char>(std::nearbyint(y));
      continue;
    }
    int exponent;
    std::frexp(y, &exponent);
    exponent = y == 0.0f ? -6 : std::max(exponent - 1, -6);
    const int units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(static_cast<double>(y)), 3 - exponent)));
    p[d] = static_cast<char>((std::signbit(y) ? 128 : 0) + units + ((exponent + 6) << 3));
  }
  return scale;
}

enum class Layout { kFused, kPerLayer, kTableNhd, kTableHnd };

// Room for `slots` contexts of `max_tokens`, all of it NaN until something is written.
struct Cache {
  std::vector<char> memory;
  std::vector<std::int32_t> table;
  KVView view;
  std::int64_t layer = 0;

  Cache(Rng& rng, Layout layout, DType dtype, int heads, int head_dim, int slots, int max_tokens, int chunk) {
    const auto item = static_cast<std::int64_t>(ItemSize(dtype));
    const std::int64_t chunks = (max_tokens + chunk - 1) / chunk;
    const int layers = layout == Layout::kFused || layout == Layout::kPerLayer ? 3 : 1;
    layer = layers == 3 ? 1 : 0;
    view.dtype = dtype;
    view.num_kv_heads = heads;
    view.head_dim = head_dim;
    view.tokens_per_chunk = chunk;
    const auto scale = static_cast<std::int64_t>(ScaleSize(dtype));
    // A chunk's keys, or values, of one layer; scales behind them.
    const std::int64_t data = heads * chunk * head_dim * item;
    view.scale_base = scale == 0 ? data : (data + 3) / 4 * 4;
    const std::int64_t plane = view.scale_base + heads * chunk * scale;
    const std::int64_t all = slots * chunks * plane;
    const bool head_major = layout == Layout::kFused || layout == Layout::kTableHnd;
    view.token_stride = head_major ? head_dim * item : heads * head_dim * item;
    view.head_stride = head_major ? chunk * head_dim * item : head_dim * item;
    view.scale_token_stride = head_major ? scale : heads * scale;
    view.scale_head_stride = head_major ? chunk * scale : scale;
    if (layout == Layout::kFused) {
      view.kv_stride = plane;
      view.layer_stride = 2 * plane;
      view.chunk_stride = layers * 2 * plane;
      view.slot_stride = chunks * view.chunk_stride;
    } else {
      view.chunk_stride = plane;
      view.slot_stride = chunks * plane;
      view.kv_stride = all;
      view.layer_stride = 2 * all;
    }
    memory.resize(layers * 2 * all);
    std::memset(memory.data(), 0xff, memory.size());  // NaN in every dtype but int8, whose scales are
    view.base = memory.data();
    if (layout == Layout::kTableNhd || layout == Layout::kTableHnd) {
      table.resize(slots * chunks);
      std::iota(table.begin(), table.end(), 0);
      std::shuffle(table.begin(), table.end(), rng);
      view.table = table.data();
      view.table_width = chunks;
    }
  }

  char* At(int slot, std::int64_t token, int which, int head, int d = 0) const {
    return view.At(slot, token, layer, which, head) + d * ItemSize(view.dtype);
  }
  float* ScaleAt(int slot, std::int64_t token, int which, int head) const {
    return view.Scale(slot, token, layer, which, head);
  }
};

// One test problem: shapes, options, queries, and what the keys and values of every sequence are.
struct Problem {
  int kv_heads = 1, group = 1, head_dim = 64, num_tokens = 0;
  DType dtype = DType::kF32, q_dtype = DType::kF32;
  float scale = 1.0f, soft_cap = 0.0f;
  int window = 0;
  bool exact_weights = false;
  std::vector<float> sinks, slopes;
  std::vector<Sequence> sequences;
  std::vector<char> q;
  std::vector<std::vector<float>> contexts;  // of each sequence: [K|V, tokens, kv_heads, head_dim]
  // Of each output element, by Reference: sum of weight * |value - output|, or weight * |value| of quantised values.
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

// Points into the problem.
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

// Runs over the cache, sequence s in slots[s]; `only` keeps one sequence.
inline Result RunAttention(const Problem& p, const Cache& cache, const std::vector<int>& slots, Parallel& parallel,
                           int only = -1) {
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
  args.options = ToOptions(p);
  if (!cpu::Attend(args, parallel).ok()) result.out.clear();
  return result;
}

// Double precision over the keys and values as the cache stores them: [num_tokens, q_heads, head_dim] and lse.
inline void Reference(Problem& p, std::vector<double>* out, std::vector<double>* lse) {
  out->assign(static_cast<std::size_t>(p.num_tokens) * p.q_heads() * p.head_dim, 0.0);
  lse->assign(static_cast<std::size_t>(p.num_tokens) * p.q_heads(), -std::numeric_limits<double>::infinity());
  p.spread.assign(out->size(), 0.0);
  for (std::size_t s = 0; s < p.sequences.size(); ++s) {
    std::vector<double> stored(p.contexts[s].size());
    std::vector<char> row_codes(p.head_dim);
    for (std::size_t i = 0; IsQuantized(p.dtype) && i < stored.size(); i += p.head_dim) {
      const double scale = QuantizeRow(row_codes.data(), p.dtype, &p.contexts[s][i], p.head_dim);
      for (int d = 0; d < p.head_dim; ++d) stored[i + d] = Read(&row_codes[d], p.dtype) * scale;
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
      const int token = p.sequences[s].query_begin + i, position = p.sequences[s].position + i;
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

// Hands tasks to threads in an order that no kernel should care about.
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

// A cache of any layout, with room for one sequence more than the problem has.
inline Cache RandomCache(Rng& rng, const Problem& p) {
  const Layout layout = PickOf(rng, {Layout::kFused, Layout::kPerLayer, Layout::kTableNhd, Layout::kTableHnd});
  const bool table = layout == Layout::kTableNhd || layout == Layout::kTableHnd;
  const int chunk = table ? PickOf(rng, {1, 3, 16, 100}) : 16 * Pick(rng, 1, 8);
  return Cache(rng, layout, p.dtype, p.kv_heads, p.head_dim, static_cast<int>(p.sequences.size()) + 1,
               p.max_tokens() + 5, chunk);
}

// Stores the problem in slots of such a cache, which it returns.
inline std::vector<int> StoreAnywhere(Rng& rng, Problem& p, const Cache& cache) {
  std::vector<int> slots = Slots(p.sequences.size() + 1);
  std::shuffle(slots.begin(), slots.end(), rng);
  slots.pop_back();
  Store(p, cache, slots);
  return slots;
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_KERNELS_UTIL_H_
