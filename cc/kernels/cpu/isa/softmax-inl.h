// From raw dot products of a tile to weights: scale, soft cap, ALiBi, mask, online softmax.

// Which keys of the tile at [begin, begin + size) a row sees: [from, to), empty when to <= from.
struct Visible {
  int from;
  int to;
};

KVPAGE_INLINE Visible VisibleTo(std::int64_t position, std::int32_t window, std::int64_t begin, int size) {
  std::int64_t from = window > 0 ? position - window + 1 - begin : 0;
  std::int64_t to = position + 1 - begin;
  if (from < 0) from = 0;
  if (from > size) from = size;
  if (to > size) to = size;
  if (to < from) to = from;
  return {static_cast<int>(from), static_cast<int>(to)};
}

// Rows that are taken through the softmax together, so that their chains of dependent steps overlap.
constexpr int kSoftmaxRows = kRowBlock;
static_assert(kFewRows <= kSoftmaxRows);

struct SoftmaxArgs {
  const SpanArgs& span;
  const float* slopes;  // of the KV head's group, or null
  std::int64_t begin;   // position of the first key
  int size;
  int stride = kTileTokens;             // from a row of scores to the next
  const float* value_scales = nullptr;  // of quantised values: what their weights are multiplied by
  Rests* rests = nullptr;               // what rounding leaves of weights, if it is wanted
};

// Soft cap and ALiBi of a row's scaled scores, in place, times log2(e).
KVPAGE_INLINE void BendScores(const SoftmaxArgs& args, int row, int padded, float* scores) {
  const SpanArgs& span = args.span;
  const float slope = args.slopes == nullptr ? 0.0f : args.slopes[(span.tile.first_row + row) % span.tile.group];
  const float offset = static_cast<float>(args.begin - span.positions[row]);
  for (int j = 0; j < padded; j += W) {
    VF s = LoadFloats(scores + j) * span.scale;
    if (span.soft_cap > 0.0f) s = Tanh(s / span.soft_cap) * span.soft_cap;
    if (slope != 0.0f) s = Fma(Splat(slope), __builtin_convertvector(Iota() + j, VF) + offset, s);
    StoreFloats(scores + j, s * kLog2E);
  }
}

// -inf where the row does not look; returns the largest score of each lane. see(j, scores) sees those from j on.
template <class See>
KVPAGE_INLINE VF MaskScores(Visible visible, int padded, float* scores, See&& see) {
  VF top = Splat(-kInfinity);
  for (int j = 0; j < padded; j += W) {
    VF s = LoadFloats(scores + j);
    if (j < visible.from || j + W > visible.to) {
      const VI index = Iota() + j;
      s = ((index >= visible.from) & (index < visible.to)) ? s : Splat(-kInfinity);
      StoreFloats(scores + j, s);
    }
    top = Max(s, top);
    see(j, s);
  }
  return top;
}

// Scores become weights 2^(score * multiplier + shift) in the lanes of L; returns their sum, and in *exact that of the
// weights before they were rounded.
KVPAGE_INLINE float Weigh(FloatLanes, int padded, VF multiplier, VF shift, float* scores, float* exact) {
  VF total = {};
  for (int j = 0; j < padded; j += W) {
    const VF p = Exp2(Fma(LoadFloats(scores + j), multiplier, shift));
    StoreFloats(scores + j, p);
    total += p;
  }
  return *exact = SumOf(total);
}

#if KVPAGE_BF16_DOT
KVPAGE_INLINE float Weigh(PairLanes, int padded, VF multiplier, VF shift, float* scores, float* exact) {
  const VI ones = SplatInt(0x3f803f80);
  VF total = {}, rounded = {};
  float* to = scores;
  for (int j = 0; j < padded; j += 2 * W, to += W) {
    const VF p = Exp2(Fma(LoadFloats(scores + j), multiplier, shift));
    const VF q = Exp2(Fma(LoadFloats(scores + j + W), multiplier, shift));
    const VI pairs = (VI)_mm512_cvtne2ps_pbh(q, p);
    StoreBits(to, pairs);
    total += p + q;
    rounded = DotPairs(rounded, pairs, ones);
  }
  *exact = SumOf(total);
  return SumOf(rounded);
}

// The same for row r with what rounding leaves of it.
KVPAGE_INLINE float WeighWithRests(PairLanes, Rests* rests, int r, int padded, VF multiplier, VF shift, float* scores) {
  VF total = {};
  __m256i sum = {};
  float* to = scores;
  for (int j = 0; j < padded; j += 2 * W, to += W) {
    const VF p = Exp2(Fma(LoadFloats(scores + j), multiplier, shift));
    const VF q = Exp2(Fma(LoadFloats(scores + j + W), multiplier, shift));
    const auto pairs = (VI)_mm512_cvtne2ps_pbh(q, p);
    StoreBits(to, pairs);
    StoreRests(*rests, r, j, p, q, pairs, &sum);
    total += p + q;
  }
  rests->starts[r] = -_mm512_reduce_add_epi32(_mm512_zextsi256_si512(sum));
  return SumOf(total);
}
#endif

// The same, with weights of quantised values multiplied by their scales; the sums are not. 0 where a row does not look,
// whatever the scale there is (what is not finite has it in its scale).
KVPAGE_INLINE VF Scaled(VF weights, const float* scales, Visible visible, int j) {
  const VI index = Iota() + j;
  const VF scaled = weights * LoadFloats(scales + j);
  return ((index >= visible.from) & (index < visible.to)) ? scaled : VF{};
}
KVPAGE_INLINE float WeighScaled(FloatLanes, const float* scales, Visible visible, int padded, VF multiplier, VF shift,
                                float* scores) {
  VF total = {};
  for (int j = 0; j < padded; j += W) {
    const VF p = Exp2(Fma(LoadFloats(scores + j), multiplier, shift));
    StoreFloats(scores + j, Scaled(p, scales, visible, j));
    total += p;
  }
  return SumOf(total);
}

#if KVPAGE_BF16_DOT
KVPAGE_INLINE float WeighScaled(PairLanes, const float* scales, Visible visible, int padded, VF multiplier, VF shift,
                                float* scores) {
  VF total = {};
  float* to = scores;
  for (int j = 0; j < padded; j += 2 * W, to += W) {
    const VF p = Exp2(Fma(LoadFloats(scores + j), multiplier, shift));
    const VF q = Exp2(Fma(LoadFloats(scores + j + W), multiplier, shift));
    StoreBits(to, (VI)_mm512_cvtne2ps_pbh(Scaled(q, scales, visible, j + W), Scaled(p, scales, visible, j)));
    total += p + q;
  }
  return SumOf(total);
}
#endif

// Turns the scores of rows first .. first + count - 1 into weights 2^(score - max), 0 where a row does not look, and
// takes them into the rows' max and sums (see StateFloats). Scores are scaled by log2(e) besides. correction[r] is what
// a row's accumulator must be multiplied by. The arrays start at row `first`; count <= kSoftmaxRows.
template <class L>
void Softmax(const SoftmaxArgs& args, int first, int count, const Visible* visible, float* scores, float* max,
             float* sum, float* exact, float* correction) {
  constexpr int kStep = L::kElements * W;
  const int padded = (args.size + kStep - 1) / kStep * kStep;
  // Nothing but a scale: it moves into the exponent, and the scores are read as they are.
  const bool plain = args.span.scale > 0.0f && args.span.soft_cap <= 0.0f && args.slopes == nullptr;
  const float scale = plain ? args.span.scale * kLog2E : 1.0f;
  float top[kSoftmaxRows + W] = {}, base[kSoftmaxRows + W], before[kSoftmaxRows + W] = {}, factor[kSoftmaxRows + W];
  float heaviest[kSoftmaxRows];  // the largest score and exponent of a value's unit, added up
  for (int r = 0; r < count; ++r) {
    float* s = scores + r * args.stride;
    if (!plain) BendScores(args, first + r, padded, s);
    before[r] = max[r];
    if (L::kElements == 1 || args.rests == nullptr) {
      top[r] = scale * MaxOf(MaskScores(visible[r], padded, s, [](int, VF) {}));
      continue;
    }
    VF largest = Splat(-kInfinity);
    top[r] = scale * MaxOf(MaskScores(visible[r], padded, s, [&](int j, VF scores) {
               largest = Max(Fma(scores, Splat(scale), LoadFloats(args.rests->value_exponents + j)), largest);
             }));
    heaviest[r] = MaxOf(largest);
  }
  for (int r = 0; r < count; r += W) {
    const VF old = LoadFloats(before + r);
    const VF largest = Max(LoadFloats(top + r), old);
    const VF empty = Splat(-kInfinity);
    // While every score so far is -inf the weights are 0, not exp(-inf - -inf).
    StoreFloats(base + r, largest == empty ? VF{} : largest);
    StoreFloats(factor + r, largest == old ? Splat(1.0f) : (old == empty ? VF{} : Exp2(old - largest)));
    StoreFloats(top + r, largest);
  }
  for (int r = 0; r < count; ++r) {
    float* row = scores + r * args.stride;
    float total = 0.0f, unrounded = 0.0f;
    if (args.value_scales != nullptr) {
      total = unrounded = WeighScaled(L{}, args.value_scales, visible[r], padded, Splat(scale), Splat(-base[r]), row);
    } else if (args.rests == nullptr) {
      total = Weigh(L{}, padded, Splat(scale), Splat(-base[r]), row, &unrounded);
    } else if constexpr (L::kElements == 2) {
      ScaleRests(args.rests, r, heaviest[r] - base[r]);
      total = unrounded = WeighWithRests(L{}, args.rests, r, padded, Splat(scale), Splat(-base[r]), row);
    }
    max[r] = top[r];
    sum[r] = sum[r] * factor[r] + total;
    exact[r] = exact[r] * factor[r] + unrounded;
    correction[r] = factor[r];
  }
}

// Few rows.
void Softmax(const SoftmaxArgs& args, int first, int count, const Visible* visible, float* scores, float* max,
             float* sum, float* correction) {
  Softmax<FloatLanes>(args, first, count, visible, scores, max, sum, sum + args.span.tile.rows, correction);
}

// Quantised keys: dot products with stored elements become scores.
KVPAGE_INLINE void ScaleScores(const float* scales, int size, float* scores) {
  for (int j = 0; j < size; j += W) StoreFloats(scores + j, LoadFloats(scores + j) * LoadFloats(scales + j));
}

// Whether a row of the tile may multiply a value that it does not see by its weight of 0 without harm.
template <class T>
KVPAGE_INLINE bool AllFinite(const char* const* rows, std::int64_t offset, int size, int head_dim) {
  VF bad = {};
  for (int i = 0; i < size; ++i) {
    for (int d = 0; d < head_dim; d += W) bad += LoadAs(T{}, rows[i] + offset + d * T::kSize) * 0.0f;
  }
  const float sum = SumOf(bad);
  return sum == 0.0f;
}
