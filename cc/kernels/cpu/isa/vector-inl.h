// Vectors of KVPAGE_LANES floats: compiler vector extensions, and intrinsics where those do not reach.

constexpr int W = KVPAGE_LANES;
typedef float VF __attribute__((vector_size(W * 4)));
typedef std::int32_t VI __attribute__((vector_size(W * 4)));
typedef std::uint16_t VH __attribute__((vector_size(W * 2)));
typedef std::int8_t VB __attribute__((vector_size(W)));

// Element tags: pointers into a cache are char*, these say what lies there.
struct F32 {
  static constexpr int kSize = 4;
};
struct BF16 {
  static constexpr int kSize = 2;
};
struct F16 {
  static constexpr int kSize = 2;
};
struct I8 {
  static constexpr int kSize = 1;
  static constexpr bool kInteger = true;
};
struct F8E4M3 {
  static constexpr int kSize = 1;
  static constexpr bool kInteger = false;
};

KVPAGE_INLINE VF Splat(float x) { return x - VF{}; }
KVPAGE_INLINE VI SplatInt(std::int32_t x) { return x - VI{}; }

template <class V>
KVPAGE_INLINE V LoadBits(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
KVPAGE_INLINE void StoreBits(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
KVPAGE_INLINE VF LoadFloats(const float* p) { return LoadBits<VF>(p); }
KVPAGE_INLINE void StoreFloats(float* p, VF v) { StoreBits(p, v); }

KVPAGE_INLINE VI Iota() {
  VI v;
  KVPAGE_UNROLL for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

// The larger bits of floats without their sign, which are ordered as the floats are, infinity and NaN on top.
KVPAGE_INLINE VI MaxMagnitude(VI top, VI bits) {
  const VI magnitude = bits & INT32_MAX;
  return magnitude > top ? magnitude : top;
}

// a * b + c
KVPAGE_INLINE VF Fma(VF a, VF b, VF c) {
#if KVPAGE_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif KVPAGE_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// The larger one; b where either is NaN.
KVPAGE_INLINE VF Max(VF a, VF b) {
#if KVPAGE_LANES == 16
  return _mm512_max_ps(a, b);
#elif KVPAGE_LANES == 8
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

KVPAGE_INLINE float MaxOf(VF v) {
#if KVPAGE_LANES == 16
  return _mm512_reduce_max_ps(v);
#else
  float m = v[0];
  KVPAGE_UNROLL for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

KVPAGE_INLINE float SumOf(VF v) {
#if KVPAGE_LANES == 16
  return _mm512_reduce_add_ps(v);
#else
  float s[W];
  StoreFloats(s, v);
  KVPAGE_UNROLL for (int h = W / 2; h > 0; h /= 2) {
    for (int i = 0; i < h; ++i) s[i] += s[i + h];
  }
  return s[0];
#endif
}

// Lane j of the result is the sum of the lanes of a[j], added in the same order for every j.
KVPAGE_INLINE VF SumEach(const VF (&a)[W]) {
#if KVPAGE_LANES == 16
  VF b[8], c[4], d[2];
  KVPAGE_UNROLL for (int i = 0; i < 8; ++i) {
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  }
  KVPAGE_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  KVPAGE_UNROLL for (int i = 0; i < 2; ++i) {
    d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
#elif KVPAGE_LANES == 8
  VF b[4], c[2];
  KVPAGE_UNROLL for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_add_ps(_mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  }
  KVPAGE_UNROLL for (int i = 0; i < 2; ++i) {
    const __m256d x = _mm256_castps_pd(b[2 * i]), y = _mm256_castps_pd(b[2 * i + 1]);
    c[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(c[0], c[1], 0x20), _mm256_permute2f128_ps(c[0], c[1], 0x31));
#else
  const VF b0 = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5) + __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
  const VF b1 = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5) + __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
  return __builtin_shufflevector(b0, b1, 0, 1, 4, 5) + __builtin_shufflevector(b0, b1, 2, 3, 6, 7);
#endif
}

KVPAGE_INLINE VF ZipLow(VF a, VF b) {
#if KVPAGE_LANES == 16
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif KVPAGE_LANES == 8
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

KVPAGE_INLINE VF ZipHigh(VF a, VF b) {
#if KVPAGE_LANES == 16
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif KVPAGE_LANES == 8
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Transposes the square of 32-bit lanes: log2(W) rounds of the perfect shuffle.
KVPAGE_INLINE void Transpose(VF (&r)[W]) {
  VF t[W];
  KVPAGE_UNROLL for (int n = 1; n < W; n *= 2) {
    KVPAGE_UNROLL for (int i = 0; i < W / 2; ++i) {
      t[2 * i] = ZipLow(r[i], r[i + W / 2]);
      t[2 * i + 1] = ZipHigh(r[i], r[i + W / 2]);
    }
    KVPAGE_UNROLL for (int i = 0; i < W; ++i) r[i] = t[i];
  }
}

// Loads of W elements as floats, stores of W floats as elements.

KVPAGE_INLINE VF LoadAs(F32, const void* p) { return LoadBits<VF>(p); }

KVPAGE_INLINE VI Widen(VH h) {
#if KVPAGE_LANES == 16  // GCC makes several instructions of the conversion
  return (VI)_mm512_cvtepu16_epi32((__m256i)h);
#elif KVPAGE_LANES == 8
  return (VI)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, VI);
#endif
}

KVPAGE_INLINE VF LoadAs(BF16, const void* p) { return (VF)(Widen(LoadBits<VH>(p)) << 16); }

// 2 W bfloat16 as two vectors, those at even places and those at odd ones: half the instructions of two loads in order.
KVPAGE_INLINE void LoadPairs(const void* p, VF* even, VF* odd) {
  const VI bits = LoadBits<VI>(p);
  *even = (VF)(bits << 16);
  *odd = (VF)(bits & static_cast<std::int32_t>(0xffff0000u));
}

KVPAGE_INLINE VF LoadAs(F16, const void* p) {
#if KVPAGE_LANES == 16
  return _mm512_cvtph_ps(LoadBits<__m256i>(p));
#elif KVPAGE_LANES == 8
  return _mm256_cvtph_ps(LoadBits<__m128i>(p));
#else
  // Moves the exponent by arithmetic: exact for subnormals too, even where subnormal floats are flushed to zero.
  const VI half = Widen(LoadBits<VH>(p));
  const VI bits = (half & 0x7fff) << 13;
  const VI exponent = bits & (0x1f << 23);
  const VI normal = bits + ((127 - 15) << 23);
  const VI special = bits + ((255 - 31) << 23);
  const VI one = SplatInt(113 << 23);
  const VI small = (VI)((VF)(bits + one) - (VF)one);
  const VI magnitude = exponent == 0 ? small : (exponent == (0x1f << 23) ? special : normal);
  return (VF)(magnitude | ((half & 0x8000) << 16));
#endif
}

KVPAGE_INLINE VF LoadAs(I8, const void* p) {
#if KVPAGE_LANES == 16  // GCC makes several instructions of the conversion
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(LoadBits<__m128i>(p)));
#elif KVPAGE_LANES == 8
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(LoadBits<VB>(p), VF);
#endif
}

// The element over ElementUnit: its bits are those of a float16 of 3 bits of
// mantissa with the exponent 8 too low. The one code that is NaN is not looked
// for: rows that are not finite have it as their scale.
KVPAGE_INLINE VF LoadAs(F8E4M3, const void* p) {
#if KVPAGE_LANES == 16
  const __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(LoadBits<__m128i>(p)), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16(static_cast<short>(0xbfff))));
#elif KVPAGE_LANES == 8
  const __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p))), 7);
  return _mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16(static_cast<short>(0xbfff))));
#else
  // As for float16: moves the exponent by arithmetic.
  const VI code = __builtin_convertvector(LoadBits<VB>(p), VI);
  const VI bits = (code & 0x7f) << 20;
  const VI normal = bits + ((127 - 15) << 23);
  const VI one = SplatInt((127 - 14) << 23);
  const VI small = (VI)((VF)(bits + one) - (VF)one);
  return (VF)(((code & 0x78) == 0 ? small : normal) | (code & INT32_MIN));
#endif
}

KVPAGE_INLINE void StoreAs(F32, void* p, VF v) { StoreBits(p, v); }

// The upper 16 bits are v rounded to bfloat16, to nearest even; not for NaN.
KVPAGE_INLINE VI RoundToUpperHalf(VF v) { return (VI)v + 0x7fff + (((VI)v >> 16) & 1); }

KVPAGE_INLINE void StoreAs(BF16, void* p, VF v) {
  const VI rounded = RoundToUpperHalf(v) >> 16;
  const VI quiet = ((VI)v >> 16) | 0x40;
  StoreBits(p, __builtin_convertvector((v == v ? rounded : quiet) & 0xffff, VH));
}

KVPAGE_INLINE std::uint16_t HalfOf(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const std::uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  std::uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00 | ((bits >> 13) & 0x3ff);  // NaN, made quiet
  } else if (bits >= 0x477ff000) {
    half = 0x7c00;  // rounds past 65504
  } else if (bits < 0x38800000) {
    // Subnormal or zero: the implicit bit joins the mantissa, which is shifted into units of 2^-24 and rounded.
    const std::uint32_t shift = 126 - (bits >> 23);
    const std::uint32_t mantissa = (bits & 0x7fffff) | 0x800000;
    if (shift > 25) {
      half = 0;
    } else {
      half = mantissa >> shift;
      const std::uint32_t rest = mantissa & ((1u << shift) - 1), tie = 1u << (shift - 1);
      half += rest > tie || (rest == tie && (half & 1));
    }
  } else {
    half = (bits - ((127 - 15) << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
}

KVPAGE_INLINE void StoreAs(F16, void* p, VF v) {
#if KVPAGE_LANES == 16
  StoreBits(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif KVPAGE_LANES == 8
  StoreBits(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  VH h;
  KVPAGE_UNROLL for (int i = 0; i < W; ++i) h[i] = HalfOf(v[i]);
  StoreBits(p, h);
#endif
}

#if KVPAGE_BF16_DOT
// acc[i] += a[2i] * b[2i] + a[2i + 1] * b[2i + 1] over bfloat16 pairs.
KVPAGE_INLINE VF DotPairs(VF acc, VI a, VI b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
#endif
