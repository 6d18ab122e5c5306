// Matrix products for many rows. The right side is packed into panels: kPanel columns side by side, row after row, so
// that the product reads one stream. The left side is read as it lies, one 32-bit lane at a time.

constexpr int kPanel = 2 * W;
// 2 vectors of this many rows are accumulated at a time: enough chains to hide the latency of the fused multiply-add,
// and one load for about two of them. The rest of the registers holds the operands.
constexpr int kProductRows = W == 16 ? 12 : 6;
static_assert(kRowBlock % kProductRows == 0);

// What is in a lane: a float,
struct FloatLanes {
  static constexpr int kElements = 1;
  static KVPAGE_INLINE VF MulAdd(VF sum, VI x, VI y) { return Fma((VF)x, (VF)y, sum); }
  // 0 where it is finite, NaN where not.
  static KVPAGE_INLINE VF Check(VI x) { return (VF)x * 0.0f; }
};
#if KVPAGE_BF16_DOT
// or two bfloat16, whose products are added up.
struct PairLanes {
  static constexpr int kElements = 2;
  static KVPAGE_INLINE VF MulAdd(VF sum, VI x, VI y) { return DotPairs(sum, x, y); }
  static KVPAGE_INLINE VF Check(VI x) { return FloatLanes::Check(x << 16) + FloatLanes::Check(x >> 16 << 16); }
};
#endif

// c[R, kPanel] = c * correction + a[R, n] * b[n, kPanel], with 0 for c where there is no correction. a_stride in lanes.
template <class L, int R>
KVPAGE_NOINLINE void Product(const float* a, std::int64_t a_stride, const float* b, int n, const float* correction,
                             float* c, int c_stride) {
  VF sum[R][2];
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = VF{};
  // A pointer for three rows: the machine adds a stride once or twice for free, and has no registers for R pointers.
  constexpr int kPointers = (R + 2) / 3;
  const float* rows[kPointers];
  KVPAGE_UNROLL for (int i = 0; i < kPointers; ++i) rows[i] = a + 3 * i * a_stride;
  for (int k = 0; k < n; ++k) {
    const VI x0 = LoadBits<VI>(b), x1 = LoadBits<VI>(b + W);
    b += kPanel;
    KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
      const VI y = SplatInt(LoadBits<std::int32_t>(rows[r / 3] + r % 3 * a_stride));
      sum[r][0] = L::MulAdd(sum[r][0], x0, y);
      sum[r][1] = L::MulAdd(sum[r][1], x1, y);
    }
    KVPAGE_UNROLL for (int i = 0; i < kPointers; ++i)++ rows[i];
  }
  if (correction != nullptr) {
    KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
      sum[r][0] = Fma(LoadFloats(c + r * c_stride), Splat(correction[r]), sum[r][0]);
      sum[r][1] = Fma(LoadFloats(c + r * c_stride + W), Splat(correction[r]), sum[r][1]);
    }
  }
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
    StoreFloats(c + r * c_stride, sum[r][0]);
    StoreFloats(c + r * c_stride + W, sum[r][1]);
  }
}

// The same for a block of kRowBlock rows.
template <class L>
KVPAGE_INLINE void BlockProduct(const float* a, std::int64_t a_stride, const float* b, int n, const float* correction,
                                float* c, int c_stride) {
  KVPAGE_UNROLL for (int r = 0; r < kRowBlock; r += kProductRows) {
    Product<L, kProductRows>(a + r * a_stride, a_stride, b, n, correction == nullptr ? nullptr : correction + r,
                             c + r * c_stride, c_stride);
  }
}

// The W lanes at p, or the n < W that are left of a row and zeros: a load past its end could touch memory that is not
// there.
template <class T>
KVPAGE_INLINE VF LoadLanes(const char* p, int n) {
  if (n >= W) return LoadAs(T{}, p);
  if (n <= 0) return VF{};
  char rest[W * T::kSize] = {};
  __builtin_memcpy(rest, p, n * T::kSize);
  return LoadAs(T{}, rest);
}

// Two elements as two bfloat16 in a lane.
template <class T>
struct PairsOf {
  static constexpr int kSize = 2 * T::kSize;
};
#if KVPAGE_BF16_DOT
template <class T>
constexpr bool kExactInBF16 = T::kSize == 1;
template <>
constexpr bool kExactInBF16<BF16> = true;
KVPAGE_INLINE VF LoadAs(PairsOf<BF16>, const void* p) { return LoadBits<VF>(p); }
template <class T>
KVPAGE_INLINE VF LoadAs(PairsOf<T>, const void* p) {
  const VF first = LoadAs(T{}, p), second = LoadAs(T{}, static_cast<const char*>(p) + W * T::kSize);
  return (VF)_mm512_cvtne2ps_pbh(second, first);
}
#endif

// Keys become columns: dst[kManyTokens / kPanel][lanes, kPanel], lanes rounded up. Columns past `size` that are in a
// panel with others are zeros.
template <class T>
void PackKeys(const char* const* rows, int size, int lanes, std::int64_t panel_floats, float* dst) {
  for (int k = 0; k < size || k % kPanel != 0; k += W) {
    float* panel = dst + k / kPanel * panel_floats + k % kPanel;
    for (int d = 0; d < lanes; d += W) {
      VF square[W];
      KVPAGE_UNROLL for (int i = 0; i < W; ++i) {
        square[i] = k + i < size ? LoadLanes<T>(rows[k + i] + d * T::kSize, lanes - d) : VF{};
      }
      Transpose(square);
      KVPAGE_UNROLL for (int i = 0; i < W; ++i) StoreFloats(panel + (d + i) * kPanel, square[i]);
    }
  }
}

// Values keep their order: dst[padded_dim / kPanel][kManyTokens, kPanel], in the lanes of L.
template <class T>
void PackValues(FloatLanes, const char* const* rows, std::int64_t offset, int size, int head_dim, float* dst) {
  const int padded_dim = PaddedDim(head_dim);
  for (int k = 0; k < size; ++k) {
    const char* row = rows[k] + offset;
    for (int d = 0; d < padded_dim; d += kPanel) {
      float* to = dst + d * kManyTokens + k * kPanel;
      StoreFloats(to, LoadLanes<T>(row + d * T::kSize, head_dim - d));
      StoreFloats(to + W, LoadLanes<T>(row + (d + W) * T::kSize, head_dim - d - W));
    }
  }
}

#if KVPAGE_BF16_DOT
// A lane has the same column of two tokens.
template <class T>
void PackValues(PairLanes, const char* const* rows, std::int64_t offset, int size, int head_dim, float* dst) {
  static_assert(kPanel == 2 * W);
  typedef std::uint16_t Halves __attribute__((vector_size(W * 4)));
  const int padded_dim = PaddedDim(head_dim);
  for (int k = 0; k < size; k += 2) {
    for (int d = 0; d < padded_dim; d += kPanel) {
      const std::int64_t at = offset + d * T::kSize;
      const int lanes = (head_dim - d) / 2;
      const auto a = (Halves)LoadLanes<PairsOf<T>>(rows[k] + at, lanes);
      const auto b = k + 1 < size ? (Halves)LoadLanes<PairsOf<T>>(rows[k + 1] + at, lanes) : Halves{};
      float* to = dst + d * (kManyTokens / 2) + k / 2 * kPanel;
      StoreBits(to, __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41,
                                            10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47));
      StoreBits(to + W, __builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63));
    }
  }
}
#endif
