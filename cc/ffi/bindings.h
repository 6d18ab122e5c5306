// Operands, attributes and results of the custom calls, in the order used by lowering. A platform begins with its
// handlers' additional arguments (`base`) and may add further results.
#ifndef KVPAGE_FFI_BINDINGS_H_
#define KVPAGE_FFI_BINDINGS_H_

#include <cstdint>
#include <utility>

#include "ffi/decode.h"

namespace kvpage {

// handle, epoch, lengths
template <class B>
auto BindCache(B&& base) {
  return std::forward<B>(base).template Arg<S32>().template Arg<U32>().template Arg<S32>();
}

// Changes of slots: two values for each; returns the new epoch, and either lengths or whether there was room.
template <class B>
auto BindSlotChange(B&& base) {
  return BindCache(std::forward<B>(base))
      .template Arg<S32>()
      .template Arg<S32>()
      .template Attr<SpecAttr>("spec")
      .template Ret<U32>();
}
template <class B>
auto BindMapSlots(B&& base) {
  return BindSlotChange(std::forward<B>(base)).template Ret<ffi::Buffer<ffi::PRED>>();
}
template <class B>
auto BindLengthChange(B&& base) {
  return BindSlotChange(std::forward<B>(base)).template Ret<S32>();
}
// own, edits, copies; returns the new epoch and lengths
template <class B>
auto BindEditSlots(B&& base) {
  return BindCache(std::forward<B>(base))
      .template Arg<S32>()
      .template Arg<S32>()
      .template Arg<S32>()
      .template Attr<SpecAttr>("spec")
      .template Attr<std::int32_t>("verb")
      .template Ret<U32>()
      .template Ret<S32>();
}
// own, copies, inv_freq; returns the new epoch and lengths
template <class B>
auto BindCopyRotated(B&& base) {
  return BindCache(std::forward<B>(base))
      .template Arg<S32>()
      .template Arg<S32>()
      .template Arg<F32>()
      .template Attr<SpecAttr>("spec")
      .template Attr<std::int32_t>("interleaved")
      .template Ret<U32>()
      .template Ret<S32>();
}
template <class B>
auto BindAfter(B&& base) {
  return std::forward<B>(base).template Arg<U32>().RemainingArgs().template Ret<U32>();
}

// cache and the arrays; returns true
template <class B>
auto BindCheckViews(B&& base) {
  return BindCache(std::forward<B>(base))
      .RemainingArgs()
      .template Attr<SpecAttr>("spec")
      .template Ret<ffi::Buffer<ffi::PRED>>();
}

// cache, slots, query_offsets, layer
template <class B>
auto BindLayer(B&& base) {
  return BindCache(std::forward<B>(base)).template Arg<S32>().template Arg<S32>().template Arg<S32>();
}
template <class B>
auto BindAppendKV(B&& base) {
  return BindLayer(std::forward<B>(base))
      .template Arg<Any>()
      .template Arg<Any>()
      .template Attr<SpecAttr>("spec")
      .template Ret<U32>();
}
template <class B>
auto BindGatherContext(B&& base) {
  return BindLayer(std::forward<B>(base)).template Attr<SpecAttr>("spec").template Ret<Any>().template Ret<Any>();
}

// window, sinks, alibi_slopes
template <class B>
auto BindOptions(B&& base) {
  return std::forward<B>(base).template Arg<S32>().template Arg<F32>().template Arg<F32>();
}
// scale, soft_cap, exact_weights
template <class B>
auto BindScores(B&& base) {
  return std::forward<B>(base)
      .template Attr<float>("scale")
      .template Attr<float>("soft_cap")
      .template Attr<std::int32_t>("exact_weights");
}
// The remaining operands of attention on a pool, after q (and k and v): options, attributes, out and lse.
// addressing: 0 slots, 1 table.
template <class B>
auto BindPoolAttention(B&& base) {
  return BindScores(BindOptions(std::forward<B>(base)).template Attr<SpecAttr>("spec"))
      .template Attr<std::int32_t>("addressing")
      .template Ret<Any>()
      .template Ret<F32>();
}
template <class B>
auto BindPagedAttention(B&& base) {
  return BindPoolAttention(BindLayer(std::forward<B>(base)).template Arg<Any>());
}
template <class B>
auto BindUpdateAndAttend(B&& base) {
  return BindPoolAttention(BindLayer(std::forward<B>(base)).template Arg<Any>().template Arg<Any>().template Arg<Any>())
      .template Ret<U32>();
}
// CPU only: ops on one of several devices, whose last result is the number of their error (cpu/shard_faults.h).
template <class B>
auto BindTryAppendKV(B&& base) {
  return BindAppendKV(std::forward<B>(base)).template Ret<S32>();
}
template <class B>
auto BindTryLengthChange(B&& base) {
  return BindLengthChange(std::forward<B>(base)).template Ret<S32>();
}
// q, and the last position that each of its tokens sees
template <class B>
auto BindAttendToLimits(B&& base) {
  return BindPoolAttention(BindLayer(std::forward<B>(base)).template Arg<Any>().template Arg<S32>())
      .template Ret<S32>();
}
// CUDA only. handle, lengths, slots, query_offsets, window; returns the plan
template <class B>
auto BindPlanAttention(B&& base) {
  return std::forward<B>(base)
      .template Arg<S32>()
      .template Arg<S32>()
      .template Arg<S32>()
      .template Arg<S32>()
      .template Arg<S32>()
      .template Attr<SpecAttr>("spec")
      .template Attr<std::int64_t>("num_tokens")
      .template Attr<std::int32_t>("num_q_heads")
      .template Attr<std::int32_t>("q_dtype")
      .template Attr<std::int32_t>("exact_weights")
      .template Ret<ffi::Buffer<ffi::U8>>();
}
// q, k_pages, v_pages, block_tables, lengths, query_offsets
template <class B>
auto BindAttendWithTables(B&& base) {
  return BindScores(BindOptions(std::forward<B>(base)
                                    .template Arg<Any>()
                                    .template Arg<Any>()
                                    .template Arg<Any>()
                                    .template Arg<S32>()
                                    .template Arg<S32>()
                                    .template Arg<S32>()))
      .template Attr<std::int32_t>("kv_layout")
      .template Ret<Any>()
      .template Ret<F32>();
}

}  // namespace kvpage

#endif  // KVPAGE_FFI_BINDINGS_H_
