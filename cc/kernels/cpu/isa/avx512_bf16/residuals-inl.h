// What rounding softmax weights to bfloat16 leaves of them, for many rows that want exact weights.
//
// Products of bfloat16 pairs are twice as fast as those of floats, but rounding weights to 8 bits costs about as much
// precision as rounding the result does. So the rest of every weight is multiplied too. Its leading 7 bits and those of
// the values are enough for that, and a dot product of bytes takes four tokens at a time: half the time of pairs.
//
// The rests of a row share a unit, and so do the values of a token, which the rests are multiplied by beforehand: a
// result depends on nothing but what its row sees.

constexpr float kMostByte = 127.0f;
// Smaller ones are left out, for what they are multiplied by could overflow.
constexpr float kLeastRest = 0x1p-118f;

// A tile's values as bytes, moved up by kByteBias to have no sign.
constexpr std::int32_t kByteBias = 128;
struct ByteValues {
  std::int32_t* words = nullptr;  // [padded_dim / kPanel][kManyTokens / 4, kPanel], a word: a column of four tokens
  // [kManyTokens]. Units are powers of two with these exponents, or 0 and -inf, as they are from the last token to the
  // end of its panel.
  float* units = nullptr;
  float* exponents = nullptr;
  std::int8_t* rests = nullptr;  // room for those of a block
};

// Of the rows of a block.
struct Rests {
  const float* value_units;  // from the block's first token on
  const float* value_exponents;
  std::int8_t* bytes;              // [kRowBlock, kManyTokens]
  float factors[kRowBlock];        // a rest times its value's unit, times this, is a byte
  float units[kRowBlock];          // and a byte times this the former
  std::int32_t starts[kRowBlock];  // what takes the bias out of a sum of products again
};

// The largest of row r's weights times units of values is 2^largest. Rounding takes no more than 1/256 of a weight.
// (Scores beyond 2^18 are rounded so coarsely that a byte may wrap. An error as large as that rounding is no worse.)
KVPAGE_INLINE void ScaleRests(Rests* rests, int r, float largest) {
  const float most = Exp2(largest - 8.0f);
  const bool any = most > kLeastRest;  // not for NaN
  rests->factors[r] = any ? kMostByte / most : 0.0f;
  rests->units[r] = any ? most / kMostByte : 0.0f;
}

// Weights that are floats leave nothing.
KVPAGE_INLINE ByteValues PackBytes(FloatLanes, const char* const*, std::int64_t, int, int, float*) { return {}; }
KVPAGE_INLINE void AddRests(FloatLanes, const Rests&, const ByteValues&, int, int, float*, int) {}

#if KVPAGE_BF16_DOT
static_assert(KVPAGE_BYTE_DOT, "pairs of bfloat16 need bytes for what they leave");

// Index of PickBytes that takes the last bytes of the words of a, then of b.
constexpr Bytes LastBytes() {
  Bytes index = {};
  for (int i = 0; i < 2 * W; ++i) index.byte[i] = static_cast<std::uint8_t>(4 * i);
  return index;
}
constexpr Bytes kLastBytes = LastBytes();

// Unit of a row of values. That of one that is not finite, or hardly above 0, is 0: it is left to rounded weights.
KVPAGE_INLINE void SetUnit(const char* row, int padded_dim, int head_dim, float* unit, float* exponent) {
  VI top = {};
  for (int d = 0; d < padded_dim; d += W) top = MaxMagnitude(top, (VI)LoadLanes<BF16>(row + d * 2, head_dim - d));
  const std::int32_t biased = MaxBits(top) >> 23;  // values are below 2^(biased - 126), and bytes below 2^7
  const bool any = biased >= 16 && biased < 255;
  const std::int32_t bits = any ? (biased - 126 - 7 + 127) << 23 : 0;
  __builtin_memcpy(unit, &bits, 4);
  *exponent = any ? static_cast<float>(biased - 126 - 7) : -kInfinity;
}

// bfloat16 values. room: kManyTokens * padded_dim / 2 floats.
ByteValues PackBytes(PairLanes, const char* const* rows, std::int64_t offset, int size, int head_dim, float* room) {
  const int padded_dim = PaddedDim(head_dim);
  float* units = room + kManyTokens / 4 * padded_dim;
  const ByteValues values = {reinterpret_cast<std::int32_t*>(room), units, units + kManyTokens,
                             reinterpret_cast<std::int8_t*>(units + 2 * kManyTokens)};
  static_assert(kManyTokens / 4 * 32 >= 2 * kManyTokens + kManyTokens / 4 * kRowBlock);
  for (int k = size; k % kPanel != 0; ++k) {
    units[k] = 0.0f;
    values.exponents[k] = -kInfinity;
  }
  for (int k = 0; k < size; k += 4) {
    const int count = size - k < 4 ? size - k : 4;
    for (int i = 0; i < count; ++i) {
      SetUnit(rows[k + i] + offset, padded_dim, head_dim, &units[k + i], &values.exponents[k + i]);
    }
    for (int d = 0; d < padded_dim; d += W) {
      VI word = {};
      for (int i = 0; i < count; ++i) {
        const VF v = LoadLanes<BF16>(rows[k + i] + offset + d * 2, head_dim - d);
        const VI byte = units[k + i] == 0.0f ? VI{} : ToIntegers(v * (1.0f / units[k + i]));
        word |= ((byte < 127 ? byte : SplatInt(127)) + kByteBias) << 8 * i;
      }
      StoreBits(values.words + d / kPanel * (kManyTokens / 4 * kPanel) + k / 4 * kPanel + d % kPanel, word);
    }
  }
  return values;
}

// The bfloat16 `first` .. `first` + W - 1 of `pairs`, as floats.
template <int first>
KVPAGE_INLINE VF HalfOfPairs(VI pairs) {
  return (VF)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, (__m512i)((Iota() + first) << 16), (__m512i)pairs);
}

// What rounding the weights p and q of 2 W tokens from j on to `pairs` has left of them. The rests' sum times
// kByteBias, piece by piece, goes into `sum`.
KVPAGE_INLINE void StoreRests(const Rests& rests, int r, int j, VF p, VF q, VI pairs, __m256i* sum) {
  const float* units = rests.value_units + j;
  const VF factor = Splat(rests.factors[r]);
  const VI a = ToIntegers((p - HalfOfPairs<0>(pairs)) * (LoadFloats(units) * factor));
  const VI b = ToIntegers((q - HalfOfPairs<W>(pairs)) * (LoadFloats(units + W) * factor));
  const __m256i bytes = _mm512_castsi512_si256((__m512i)PickBytes(a, AsVector(kLastBytes), b));
  *sum = _mm256_dpbusd_epi32(*sum, _mm256_set1_epi8(static_cast<char>(kByteBias)), bytes);
  StoreBits(rests.bytes + r * kManyTokens + j, bytes);
}

// c[R, kPanel] += rests[R, 4 n] * words[n, kPanel].
template <int R>
KVPAGE_NOINLINE void RestProduct(const Rests& rests, const std::int32_t* words, int n, float* c, int c_stride) {
  VI sum[R][2];
  KVPAGE_UNROLL for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = SplatInt(rests.starts[i]);
  constexpr int kPointers = (R + 2) / 3;  // as in Product
  const std::int8_t* rows[kPointers];
  KVPAGE_UNROLL for (int i = 0; i < kPointers; ++i) rows[i] = rests.bytes + 3 * i * kManyTokens;
  for (int k = 0; k < n; ++k) {
    const VI x0 = LoadBits<VI>(words), x1 = LoadBits<VI>(words + W);
    words += kPanel;
    KVPAGE_UNROLL for (int i = 0; i < R; ++i) {
      const VI y = SplatInt(LoadBits<std::int32_t>(rows[i / 3] + i % 3 * kManyTokens));
      sum[i][0] = DotBytes(sum[i][0], x0, y);
      sum[i][1] = DotBytes(sum[i][1], x1, y);
    }
    KVPAGE_UNROLL for (int i = 0; i < kPointers; ++i) rows[i] += 4;
  }
  KVPAGE_UNROLL for (int i = 0; i < R; ++i) {
    const VF unit = Splat(rests.units[i]);
    float* to = c + i * c_stride;
    StoreFloats(to, Fma(_mm512_cvtepi32_ps((__m512i)sum[i][0]), unit, LoadFloats(to)));
    StoreFloats(to + W, Fma(_mm512_cvtepi32_ps((__m512i)sum[i][1]), unit, LoadFloats(to + W)));
  }
}

// Adds a block's rests times the values of `size` tokens from `from` on to acc.
KVPAGE_INLINE void AddRests(PairLanes, const Rests& rests, const ByteValues& values, int from, int size, float* acc,
                            int padded_dim) {
  for (int d = 0; d < padded_dim; d += kPanel) {
    const std::int32_t* words = values.words + d / kPanel * (kManyTokens / 4 * kPanel) + from / 4 * kPanel;
    RestProduct<kRowBlock>(rests, words, (size + 3) / 4, acc + d, padded_dim);
  }
}

#endif
