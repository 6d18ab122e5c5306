// What surrounds the tiles: queries in, partial results merged, outputs out, elements converted. And the entry that
// picks the kernel for a span.

template <class D, class S>
void ConvertAs(char* dst, const char* src, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) StoreAs(D{}, dst + i * D::kSize, LoadAs(S{}, src + i * S::kSize));
  if (i < n) {
    char from[W * S::kSize] = {};
    char to[W * D::kSize];
    __builtin_memcpy(from, src + i * S::kSize, (n - i) * S::kSize);
    StoreAs(D{}, to, LoadAs(S{}, from));
    __builtin_memcpy(dst + i * D::kSize, to, (n - i) * D::kSize);
  }
}

template <class D>
void ConvertTo(char* dst, const char* src, DType src_dtype, std::int64_t n) {
  switch (src_dtype) {
    case DType::kF32:
      return ConvertAs<D, F32>(dst, src, n);
    case DType::kBF16:
      return ConvertAs<D, BF16>(dst, src, n);
    case DType::kF16:
      return ConvertAs<D, F16>(dst, src, n);
    case DType::kI8:
    case DType::kF8E4M3:
      return;
  }
}

void Convert(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::int64_t n) {
  char* to = static_cast<char*>(dst);
  const char* from = static_cast<const char*>(src);
  if (dst_dtype == src_dtype) {
    __builtin_memcpy(to, from, n * (dst_dtype == DType::kF32 ? 4 : 2));
    return;
  }
  switch (dst_dtype) {
    case DType::kF32:
      return ConvertTo<F32>(to, from, src_dtype, n);
    case DType::kBF16:
      return ConvertTo<BF16>(to, from, src_dtype, n);
    case DType::kF16:
      return ConvertTo<F16>(to, from, src_dtype, n);
    case DType::kI8:
    case DType::kF8E4M3:
      return;
  }
}

// Bytes from the sequence's first new token to the row's query (or output).
KVPAGE_INLINE std::int64_t RowIndex(const RowTile& tile, int kv_head, int r) {
  const std::int64_t row = tile.first_row + r;
  return row / tile.group * tile.num_q_heads + static_cast<std::int64_t>(kv_head) * tile.group + row % tile.group;
}

void Load(const LoadArgs& args) {
  const int head_dim = args.tile.head_dim, padded_dim = PaddedDim(head_dim);
  const int padded_rows = PaddedRows(args.tile.rows);
  const std::int64_t row_bytes = static_cast<std::int64_t>(head_dim) * (args.dtype == DType::kF32 ? 4 : 2);
  auto* q16 = reinterpret_cast<std::uint16_t*>(args.dst + padded_rows * padded_dim);
  const bool pairs =
      args.tile.rows > kFewRows && TakesPairs(args.kv_dtype, args.dtype == DType::kBF16, args.exact_weights, head_dim);
  for (int r = 0; r < padded_rows; ++r) {
    const int filled = r < args.tile.rows ? head_dim : 0;
    const char* src = static_cast<const char*>(args.q) + RowIndex(args.tile, args.kv_head, r) * row_bytes;
    if (!pairs) {
      float* q = args.dst + r * padded_dim;
      if (filled > 0) Convert(q, DType::kF32, src, args.dtype, head_dim);
      for (int d = filled; d < padded_dim; ++d) q[d] = 0.0f;
    }
    if (args.dtype == DType::kBF16) {  // used as it is
      std::uint16_t* to = q16 + r * padded_dim;
      if (filled > 0) __builtin_memcpy(to, src, row_bytes);
      for (int d = filled; d < padded_dim; ++d) to[d] = 0;
    }
  }
}

template <class T>
void AttendQuantized(const SpanArgs& args) {
  const bool few = args.tile.rows <= kFewRows;
#if KVPAGE_BYTE_DOT
  if constexpr (T::kInteger) {
    if (few) return args.q_is_bf16 && !args.exact_weights ? AttendCodes<2>(args) : AttendCodes<3>(args);
  } else {
    if (few && args.q_is_bf16 && !args.exact_weights) return AttendCodes<0>(args);
  }
#endif
  few ? AttendFew<T>(args) : AttendMany<T>(args);
}

void Attend(const SpanArgs& args) {
  const int padded_rows = PaddedRows(args.tile.rows), padded_dim = PaddedDim(args.tile.head_dim);
  for (int h = 0; h < args.heads && !args.resume; ++h) {
    float* acc = args.state + h * StateFloats(args.tile.rows, args.tile.head_dim);
    for (int i = 0; i < padded_rows * padded_dim; i += W) StoreFloats(acc + i, VF{});
    float* max = acc + padded_rows * padded_dim;
    for (int r = 0; r < padded_rows; ++r) max[r] = -kInfinity;
    for (int r = 0; r < 2 * padded_rows; ++r) max[padded_rows + r] = 0.0f;
  }
  const bool few = args.tile.rows <= kFewRows;
  switch (args.dtype) {
    case DType::kF32:
      return few ? AttendFew<F32>(args) : AttendMany<F32>(args);
    case DType::kBF16:
      return few ? AttendFew<BF16>(args) : AttendMany<BF16>(args);
    case DType::kF16:
      return few ? AttendFew<F16>(args) : AttendMany<F16>(args);
    case DType::kI8:
      return AttendQuantized<I8>(args);
    case DType::kF8E4M3:
      return AttendQuantized<F8E4M3>(args);
  }
}

void Merge(float* into, const float* from, int rows, int head_dim) {
  const int padded_rows = PaddedRows(rows), padded_dim = PaddedDim(head_dim);
  float* max = into + padded_rows * padded_dim;
  float* sum = max + padded_rows;
  const float* from_max = from + padded_rows * padded_dim;
  float* exact = sum + padded_rows;
  const float* from_sum = from_max + padded_rows;
  const float* from_exact = from_sum + padded_rows;
  for (int r = 0; r < rows; ++r) {
    const float top = from_max[r] > max[r] ? from_max[r] : max[r];
    const float keep = max[r] == -kInfinity ? (top == -kInfinity ? 1.0f : 0.0f) : Exp2(max[r] - top);
    const float take = from_max[r] == -kInfinity ? (top == -kInfinity ? 1.0f : 0.0f) : Exp2(from_max[r] - top);
    float* a = into + r * padded_dim;
    const float* b = from + r * padded_dim;
    for (int d = 0; d < padded_dim; d += W) {
      StoreFloats(a + d, Fma(LoadFloats(b + d), Splat(take), LoadFloats(a + d) * keep));
    }
    sum[r] = sum[r] * keep + from_sum[r] * take;
    exact[r] = exact[r] * keep + from_exact[r] * take;
    max[r] = top;
  }
}

template <class D>
KVPAGE_INLINE void StoreScaled(char* out, const float* acc, VF factor, int head_dim) {
  int d = 0;
  for (; d + W <= head_dim; d += W) StoreAs(D{}, out + d * D::kSize, LoadFloats(acc + d) * factor);
  if (d == head_dim) return;
  char rest[W * D::kSize];
  StoreAs(D{}, rest, LoadFloats(acc + d) * factor);
  __builtin_memcpy(out + d * D::kSize, rest, (head_dim - d) * D::kSize);
}

void Finish(const FinishArgs& args) {
  const int head_dim = args.tile.head_dim, padded_dim = PaddedDim(head_dim);
  const int padded_rows = PaddedRows(args.tile.rows);
  const float* max = args.state + padded_rows * padded_dim;
  const float* sum = max + padded_rows;
  const float* exact = sum + padded_rows;
  const std::int64_t row_bytes = static_cast<std::int64_t>(head_dim) * (args.dtype == DType::kF32 ? 4 : 2);
  for (int r = 0; r < args.tile.rows; ++r) {
    const std::int64_t index = RowIndex(args.tile, args.kv_head, r);
    float top = max[r], factor = 1.0f, extra = 0.0f;
    if (args.sinks != nullptr) {
      const int head = args.kv_head * args.tile.group + static_cast<int>((args.tile.first_row + r) % args.tile.group);
      const float sink = args.sinks[head] * kLog2E;
      if (sink > top || sink != sink) {
        top = sink;
        factor = Exp2(max[r] - sink);
        extra = 1.0f;
      } else if (sink != -kInfinity) {
        extra = Exp2(sink - top);
      }
    }
    if (args.lse != nullptr) args.lse[index] = top * kLn2 + Log(exact[r] * factor + extra);
    const VF inverse = Splat(factor / (sum[r] * factor + extra));
    char* out = static_cast<char*>(args.out) + index * row_bytes;
    const float* acc = args.state + r * padded_dim;
    switch (args.dtype) {
      case DType::kF32:
        StoreScaled<F32>(out, acc, inverse, head_dim);
        break;
      case DType::kBF16:
        StoreScaled<BF16>(out, acc, inverse, head_dim);
        break;
      case DType::kF16:
        StoreScaled<F16>(out, acc, inverse, head_dim);
        break;
      case DType::kI8:
      case DType::kF8E4M3:
        break;
    }
  }
}
