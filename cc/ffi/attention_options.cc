#include "ffi/attention_options.h"

namespace kvpage {
namespace {

// Reads an optional array with one value per query head; null if it is empty.
Status ToPerHead(const char* op, const char* name, const F32& values, std::int64_t num_q_heads, const float** out) {
  *out = values.element_count() > 0 ? values.typed_data() : nullptr;
  return *out == nullptr ? Status() : CheckCount(op, name, values.element_count(), num_q_heads);
}

}  // namespace

Status ToOptions(const char* op, const OptionOperands& operands, std::int64_t num_q_heads, AttentionOptions* options) {
  KVPAGE_RETURN_IF_ERROR(CheckCount(op, "window", operands.sliding_window.element_count(), 1));
  KVPAGE_RETURN_IF_ERROR(ToPerHead(op, "sinks", operands.sinks, num_q_heads, &options->sinks));
  KVPAGE_RETURN_IF_ERROR(ToPerHead(op, "alibi_slopes", operands.alibi_slopes, num_q_heads, &options->alibi_slopes));
  options->sliding_window = operands.sliding_window.typed_data();
  options->scale = operands.scale;
  options->soft_cap = operands.soft_cap;
  options->exact_weights = operands.exact_weights != 0;
  return {};
}

}  // namespace kvpage
