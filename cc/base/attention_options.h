// AttentionOptions: the variant of attention that an op computes. Shared by the CPU kernels, the CUDA kernels and the
// handlers that decode it.
#ifndef KVPAGE_BASE_ATTENTION_OPTIONS_H_
#define KVPAGE_BASE_ATTENTION_OPTIONS_H_

#include <cstdint>

namespace kvpage {

// The arrays are operands of the op, in the memory of the platform that runs it. The struct has no member functions
// because it is compiled into code for several instruction sets and for devices.
struct AttentionOptions {
  // [1] A token sees itself and the window - 1 tokens before it; if null or a value <= 0, all tokens before it.
  const std::int32_t* sliding_window = nullptr;
  const float* sinks = nullptr;         // [num_q_heads] an extra logit per head, only in the denominator; or null
  const float* alibi_slopes = nullptr;  // [num_q_heads] adds slope * (key position - query position); or null
  float scale = 1.0f;                   // multiplies the dot products
  float soft_cap = 0.0f;                // s -> cap * tanh(s / cap) on scaled scores, before ALiBi; <= 0: off
  bool exact_weights = false;           // softmax weights are not rounded to 16 bits
};

}  // namespace kvpage

#endif  // KVPAGE_BASE_ATTENTION_OPTIONS_H_
