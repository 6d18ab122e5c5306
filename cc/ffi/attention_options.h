// Decodes the operands and attributes of a custom call that select the variant of attention. Shared by the CPU and the
// CUDA handlers.
#ifndef KVPAGE_FFI_ATTENTION_OPTIONS_H_
#define KVPAGE_FFI_ATTENTION_OPTIONS_H_

#include <cstdint>

#include "base/attention_options.h"
#include "base/status.h"
#include "ffi/decode.h"

namespace kvpage {

// As XLA passes them to a handler, in the order of the binding. Missing sinks and slopes are empty arrays.
struct OptionOperands {
  S32 sliding_window;  // [1]
  F32 sinks;           // [num_q_heads] or [0]
  F32 alibi_slopes;    // [num_q_heads] or [0]
  float scale;
  float soft_cap;
  std::int32_t exact_weights;  // 0 or 1
};

// Checks the shapes. The values are checked by the kernels, because on CUDA the host cannot read them.
Status ToOptions(const char* op, const OptionOperands& operands, std::int64_t num_q_heads, AttentionOptions* options);

}  // namespace kvpage

#endif  // KVPAGE_FFI_ATTENTION_OPTIONS_H_
