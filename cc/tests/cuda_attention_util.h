// Helpers for tests of attention on the emulated device: a batch that has passed its check, run on a cache, and the
// comparison with the reference.
#ifndef KVPAGE_TESTS_CUDA_ATTENTION_UTIL_H_
#define KVPAGE_TESTS_CUDA_ATTENTION_UTIL_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/attend.h"
#include "kernels/cuda/kernels.h"
#include "testing/cuda_emulation/emulator.h"
#include "tests/expect_ok.h"
#include "tests/kernels_util.h"

namespace kvpage::testing {

inline std::string DescribeCuda(const Problem& p) {
  std::ostringstream text;
  text << "heads " << p.kv_heads << "x" << p.group << " dim " << p.head_dim << " " << Name(p.dtype) << " q "
       << Name(p.q_dtype) << " window " << p.window << " cap " << p.soft_cap << " sinks " << !p.sinks.empty()
       << " alibi " << !p.slopes.empty() << " exact " << p.exact_weights << " lengths";
  for (const Sequence& s : p.sequences) text << " " << s.position << "+" << s.query_length;
  return text.str();
}

struct FreeScratch {
  void operator()(void* p) const { std::free(p); }
};

struct CudaRun {
  int only = -1;        // keeps one sequence and deactivates the others
  bool failed = false;  // whether the check failed
  bool aligned = true;  // whether the caller claims an aligned view
  int padding = 0;      // number of inactive sequences in front
};

inline cuda::AttentionOperands ToOperands(const Problem& p, const Cache& cache, Result* result) {
  cuda::AttentionOperands a;
  a.q = p.q.data();
  a.out = result->out.data();
  a.lse = result->lse.data();
  a.q_dtype = p.q_dtype;
  a.kv_dtype = p.dtype;
  a.num_q_heads = p.q_heads();
  a.num_kv_heads = p.kv_heads;
  a.head_dim = p.head_dim;
  a.max_context = p.max_tokens();
  a.options = ToOptions(p);
  static_cast<void>(cache);
  return a;
}

// A batch that has passed its check, and the scratch memory of its attention.
class CudaBatch {
 public:
  CudaBatch(const Problem& p, const Cache& cache, const std::vector<int>& slots, const CudaRun& options = {})
      : num_sequences_(static_cast<std::int64_t>(slots.size()) + options.padding),
        num_tokens_(p.num_tokens),
        aligned_(options.aligned) {
    result_.out.assign(p.q.size(), '\x55');
    result_.lse.assign(static_cast<std::size_t>(p.num_tokens) * p.q_heads(), 12345.0f);
    operands_ = ToOperands(p, cache, &result_);
    const std::size_t bytes =
        cuda::AttentionBytes(operands_, num_sequences_, p.num_tokens) + cuda::PlanBytes(num_sequences_);
    scratch_.reset(std::aligned_alloc(256, bytes));
    std::memset(scratch_.get(), 0xff, bytes);
    auto* const checked = new (scratch_.get()) CheckedBatch;
    checked->ok = options.failed ? 0 : 1;
    checked->layer = static_cast<std::int32_t>(cache.layer);
    checked->num_sequences = static_cast<std::int32_t>(num_sequences_);
    checked->sliding_window = p.window;
    checked->view = cache.view;
    for (int i = 0; i < options.padding; ++i) checked->sequences()[i] = {-1, 0, 0, 0};
    for (std::size_t s = 0; s < slots.size(); ++s) {
      Sequence sequence = p.sequences[s];
      sequence.slot = options.only >= 0 && options.only != static_cast<int>(s) ? -1 : slots[s];
      checked->sequences()[options.padding + s] = sequence;
    }
  }
  CudaBatch(const CudaBatch&) = delete;
  CudaBatch& operator=(const CudaBatch&) = delete;

  Status Launch() const {
    return cuda::LaunchAttention(operands_, num_sequences_, num_tokens_, aligned_, scratch_.get(), nullptr);
  }
  const Result& result() const { return result_; }

 private:
  const std::int64_t num_sequences_, num_tokens_;
  const bool aligned_;
  Result result_;
  cuda::AttentionOperands operands_;
  std::unique_ptr<void, FreeScratch> scratch_;
};

inline Result RunCuda(const Problem& p, const Cache& cache, const std::vector<int>& slots,
                      const CudaRun& options = {}) {
  const CudaBatch batch(p, cache, slots, options);
  EXPECT_OK(batch.Launch()) << DescribeCuda(p);
  return batch.result();
}

// Compares with the reference, allowing for the rounding of the output type and of float32 sums. On tensor cores,
// weights are also rounded to the query type, which averages out over the context; if a value's scale multiplies its
// weight, the largest weight is rounded too.
inline void CheckCuda(Problem& p, const Result& result, const std::vector<double>& out, const std::vector<double>& lse,
                      bool tensor_cores, const std::string& what = "") {
  const double unit = p.q_dtype == DType::kF32 ? 0.0 : (p.q_dtype == DType::kBF16 ? 1.0 / 256 : 1.0 / 2048);
  const double rounding = tensor_cores ? 1.5 * unit : 1e-5;
  const double scaled = tensor_cores && IsQuantized(p.dtype) ? 0.5 * unit : 0.0;
  double worst = 0, worst_lse = 0, difference = 0, norm = 1e-30;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double got = Read(&result.out[i * ItemSize(p.q_dtype)], p.q_dtype);
    const double error = std::fabs(got - out[i]) - unit * std::fabs(out[i]) - rounding - scaled * p.spread[i];
    worst = std::isnan(error) ? 1e9 : std::max(worst, error);
    difference += (got - out[i]) * (got - out[i]);
    norm += out[i] * out[i];
  }
  for (std::size_t i = 0; i < lse.size(); ++i) {
    if (std::isinf(lse[i]) && std::isinf(result.lse[i])) continue;
    const double error = std::fabs(result.lse[i] - lse[i]) / (1.0 + std::fabs(lse[i]));
    worst_lse = std::isnan(error) ? 1e9 : std::max(worst_lse, error);
  }
  EXPECT_LE(worst, 0) << worst << " " << what << " " << DescribeCuda(p);
  EXPECT_LT(std::sqrt(difference / norm), std::max(1.5 * unit, 2e-5))
      << std::sqrt(difference / norm) << " " << what << " " << DescribeCuda(p);
  EXPECT_LT(worst_lse, 1e-5) << worst_lse << " " << what << " " << DescribeCuda(p);
}

// Configures the emulated device for the duration of a scope.
class ScopedDevice {
 public:
  ScopedDevice(int num_sms, std::uint64_t seed) : before_(emulation::device()) {
    emulation::device().num_sms = num_sms;
    emulation::device().seed = seed;
  }
  ~ScopedDevice() { emulation::device() = before_; }
  ScopedDevice(const ScopedDevice&) = delete;
  ScopedDevice& operator=(const ScopedDevice&) = delete;

 private:
  emulation::Device before_;
};

inline bool UsesTensorCores(const Problem& p) {
  Result none;
  cuda::AttentionOperands a;
  a.q_dtype = p.q_dtype;
  a.kv_dtype = p.dtype;
  a.head_dim = p.head_dim;
  a.options.exact_weights = p.exact_weights;
  return cuda::HasTensorCoreKernels(a);
}

inline void AddOptions(Rng& rng, Problem& p) {
  if (Pick(rng, 0, 2) == 0) p.window = PickOf(rng, {1, 2, 17, 64, 100, 513});
  if (Pick(rng, 0, 2) == 0) p.soft_cap = PickOf(rng, {0.7f, 5.0f, 50.0f});
  std::uniform_real_distribution<float> uniform(-2.0f, 4.0f);
  for (int h = 0, sinks = Pick(rng, 0, 2); sinks == 0 && h < p.q_heads(); ++h) p.sinks.push_back(uniform(rng));
  for (int h = 0, alibi = Pick(rng, 0, 2); alibi == 0 && h < p.q_heads(); ++h) p.slopes.push_back(uniform(rng) * 0.05f);
}

inline std::vector<std::pair<int, int>> RandomLengths(Rng& rng, int longest) {
  std::vector<std::pair<int, int>> lengths;
  for (int s = Pick(rng, 1, 4); s > 0; --s) {
    const int before = PickOf(rng, {0, Pick(rng, 1, 63), Pick(rng, 64, 300), Pick(rng, 0, longest)});
    lengths.emplace_back(before, PickOf(rng, {1, 1, 1, 2, Pick(rng, 3, 12)}));
  }
  if (Pick(rng, 0, 2) == 0) lengths.emplace_back(Pick(rng, 0, 90), Pick(rng, 20, 70));  // a prefill
  return lengths;
}

// A problem stored in a cache of random layout, with the reference results, on a device of random size.
class StoredProblem {
 public:
  StoredProblem(Rng& rng, Problem& p)
      : p_(p), cache_(RandomCache(rng, p)), slots_(StoreAnywhere(rng, p, cache_)), device_(Pick(rng, 1, 6), rng()) {
    Reference(p, &out_, &lse_);
  }
  // Compares the kernels with the reference; `tensor_cores` selects the tolerance.
  void Check(const CudaRun& run, bool tensor_cores, const std::string& what = "") const {
    CheckCuda(p_, RunCuda(p_, cache_, slots_, run), out_, lse_, tensor_cores, what);
  }

 private:
  Problem& p_;
  const Cache cache_;
  const std::vector<int> slots_;
  const ScopedDevice device_;
  std::vector<double> out_, lse_;
};

inline void CheckAnywhere(Rng& rng, Problem& p, bool aligned) {
  const StoredProblem stored(rng, p);
  CudaRun run;
  run.aligned = aligned;
  run.padding = Pick(rng, 0, 2);
  stored.Check(run, aligned && UsesTensorCores(p));
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_CUDA_ATTENTION_UTIL_H_
