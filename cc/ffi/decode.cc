#include "ffi/decode.h"

#include <algorithm>

#include "cache/registry.h"

namespace kvpage {

Status Resolve(const char* op, const S32& handle, SpecAttr spec, std::shared_ptr<Pool>* pool) {
  if (handle.element_count() != 2) return InvalidArgument(std::string(op) + ": the cache's handle must be int32[2]");
  KVPAGE_RETURN_IF_ERROR(Find(op, handle.typed_data()[0], pool));
  SpecInts ints{};
  if (spec.size() != ints.size()) return InvalidArgument(std::string(op) + ": the spec attribute must have 8 numbers");
  std::copy(spec.begin(), spec.end(), ints.begin());
  return (*pool)->CheckProgram(op, ints);
}

CacheRef Cache(const S32& handle, const U32& epoch, const S32& lengths) {
  return {handle.typed_data()[1], epoch.typed_data()[0], lengths.typed_data()};
}

BatchRef Batch(const S32& slots, const S32& offsets, std::int64_t num_tokens) {
  return {slots.typed_data(), static_cast<std::int64_t>(slots.element_count()), offsets.typed_data(), num_tokens};
}

Status CheckCount(const char* op, const char* name, std::size_t have, std::int64_t wanted) {
  if (static_cast<std::int64_t>(have) == wanted) return {};
  return InvalidArgument(std::string(op) + ": " + name + " must have " + std::to_string(wanted) + " elements, it has " +
                         std::to_string(have));
}

Status ToDType(const char* what, ffi::DataType type, DType* out) {
  switch (type) {
    case ffi::F32:
      *out = DType::kF32;
      return {};
    case ffi::BF16:
      *out = DType::kBF16;
      return {};
    case ffi::F16:
      *out = DType::kF16;
      return {};
    default:
      return InvalidArgument(std::string(what) + " must be float32, bfloat16 or float16");
  }
}

Status CheckQuery(const char* op, const Any& q, std::int64_t kv_heads, std::int64_t head_dim, DType* dtype) {
  KVPAGE_RETURN_IF_ERROR(ToDType("q", q.element_type(), dtype));
  const auto shape = q.dimensions();
  if (shape.size() == 3 && shape[2] == head_dim && shape[1] % kv_heads == 0) return {};
  return InvalidArgument(std::string(op) + ": q must be [tokens, " + std::to_string(kv_heads) + " * n heads, " +
                         std::to_string(head_dim) + "]");
}

Status CheckKeysAndValues(const char* op, const Any& k, const Any& v, std::int64_t kv_heads, std::int64_t head_dim,
                          DType* dtype) {
  KVPAGE_RETURN_IF_ERROR(ToDType("k", k.element_type(), dtype));
  const auto shape = k.dimensions();
  if (v.element_type() == k.element_type() && v.element_count() == k.element_count() && shape.size() == 3 &&
      shape[1] == kv_heads && shape[2] == head_dim) {
    return {};
  }
  return InvalidArgument(std::string(op) + ": k and v must both be [tokens, " + std::to_string(kv_heads) + ", " +
                         std::to_string(head_dim) + "]");
}

Status ToVerb(std::int32_t attribute, DeviceOp* verb) {
  *verb = static_cast<DeviceOp>(attribute);
  if (IsHostVerb(*verb)) return {};
  return InvalidArgument("edit_slots: this version of jax_kvpage knows no verb with number " +
                         std::to_string(attribute) + ": compile the program again");
}

Status ToEditList(const char* op, const S32& own, const S32& edits, const S32& copies, EditList* list) {
  static_assert(sizeof(SlotEdit) == 4 * sizeof(std::int32_t) && sizeof(TokenCopy) == 4 * sizeof(std::int32_t));
  const auto rows = [](const S32& table, std::int64_t width) {
    const auto shape = table.dimensions();
    return shape.size() == 2 && shape[1] == width ? shape[0] : -1;
  };
  list->edits = reinterpret_cast<const SlotEdit*>(edits.typed_data());
  list->num_edits = rows(edits, 4);
  list->copies = reinterpret_cast<const TokenCopy*>(copies.typed_data());
  list->num_copies = rows(copies, 4);
  if (own.element_count() == 2 && list->num_edits >= 0 && list->num_copies >= 0) return {};
  return InvalidArgument(std::string(op) +
                         ": the called pool's handle must be int32[2], edits int32[n, 4] and copies int32[m, 4]");
}

Status ToSegmentList(const char* op, const S32& own, const S32& copies, SegmentList* list) {
  static_assert(sizeof(SegmentCopy) == 5 * sizeof(std::int32_t));
  const auto shape = copies.dimensions();
  if (own.element_count() != 2 || shape.size() != 2 || shape[1] != 5) {
    return InvalidArgument(std::string(op) + ": the called pool's handle must be int32[2] and copies int32[n, 5]");
  }
  *list = {reinterpret_cast<const SegmentCopy*>(copies.typed_data()), shape[0]};
  return {};
}

Status ToRotation(const char* op, const F32& inv_freq, std::int32_t interleaved, std::int64_t num_layers,
                  std::int64_t head_dim, Rotation* rotation) {
  const auto shape = inv_freq.dimensions();
  if (shape.size() != 2 || shape[0] != num_layers || 2 * shape[1] > head_dim) {
    return InvalidArgument(std::string(op) + ": inv_freq must be float32[" + std::to_string(num_layers) +
                           ", n] with n at most head_dim / 2, " + std::to_string(head_dim / 2));
  }
  *rotation = {inv_freq.typed_data(), static_cast<std::int32_t>(shape[1]), interleaved != 0};
  return {};
}

Status CheckPerSlot(const char* op, const S32& slots, const S32& values) {
  if (slots.element_count() == values.element_count()) return {};
  return InvalidArgument(std::string(op) + ": operands must have one entry per slot");
}

Status PageView(const Any& k_pages, const Any& v_pages, const S32& block_tables, std::int32_t kv_layout, KVView* view) {
  const auto shape = k_pages.dimensions();
  const bool hnd = kv_layout == 1;
  KVPAGE_RETURN_IF_ERROR(ToDType("k_pages", k_pages.element_type(), &view->dtype));
  const std::int64_t item = static_cast<std::int64_t>(ItemSize(view->dtype));
  const std::int64_t page_size = hnd ? shape[2] : shape[1];
  const std::int64_t heads = hnd ? shape[1] : shape[2];
  const std::int64_t dim = shape[3];
  view->base = static_cast<char*>(k_pages.untyped_data());
  view->kv_stride = static_cast<char*>(v_pages.untyped_data()) - view->base;
  view->num_kv_heads = static_cast<std::int32_t>(heads);
  view->head_dim = static_cast<std::int32_t>(dim);
  view->tokens_per_chunk = page_size;
  view->chunk_stride = page_size * heads * dim * item;
  view->token_stride = (hnd ? dim : heads * dim) * item;
  view->head_stride = (hnd ? page_size * dim : dim) * item;
  view->table = block_tables.typed_data();
  view->table_width = block_tables.dimensions()[1];
  return {};
}

}  // namespace kvpage
