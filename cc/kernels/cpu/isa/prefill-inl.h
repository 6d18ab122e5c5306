// Many query rows (prefill): a tile of keys and values is packed once, then every block of kRowBlock rows takes its
// scores, its softmax and its weighted values through the caches nearest to the core.

// Lanes of a dot product that are added up in one chain. Longer ones would be less exact than what XLA does.
constexpr int kScoreLanes = 64;
constexpr float kOnes[kRowBlock] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// What a tile has been packed into, and where.
struct PackedTile {
  std::int64_t begin;  // position of its first token
  int size;
  const float* keys;
  const float* values;
  const float* scales;  // of the first key, kSpanScales before its value's, or null
  int key_lanes;        // of a query or a key
  bool finite;          // whether 0 times any of the values that not every row sees is 0
  ByteValues bytes;     // for the rests of weights, if they are wanted
};

// Values panel d / kPanel from token `from` on.
template <class L>
KVPAGE_INLINE const float* ValuesAt(const float* values, int d, int from) {
  return values + d * (kManyTokens / L::kElements) + from / L::kElements * kPanel;
}

template <class L>
bool FinitePanels(const float* values, int size, int padded_dim) {
  VF bad = {};
  for (int d = 0; d < padded_dim; d += kPanel) {
    const float* panel = ValuesAt<L>(values, d, 0);
    for (int i = 0; i < (size + L::kElements - 1) / L::kElements * kPanel; i += W) {
      bad += L::Check(LoadBits<VI>(panel + i));
    }
  }
  return SumOf(bad) == 0.0f;
}

// One row over exactly the values it sees, for tiles where 0 * value would be NaN. The same products in the same order
// as in Product, so what other tokens hold does not change a bit. panel: room for one.
template <class L>
void CarefulValues(const float* values, Visible visible, const float* weights, const float* correction, float* acc,
                   int padded_dim, float* panel) {
  const int first = visible.from / L::kElements, lanes = (visible.to + L::kElements - 1) / L::kElements - first;
  for (int d = 0; d < padded_dim; d += kPanel) {
    __builtin_memcpy(panel, ValuesAt<L>(values, d, visible.from), std::int64_t{4} * lanes * kPanel);
    if (L::kElements == 2) {  // the other half of a pair
      float* last = panel + (lanes - 1) * kPanel;
      for (int i = 0; i < kPanel; i += W) {
        if (visible.from % 2 != 0) StoreBits(panel + i, LoadBits<VI>(panel + i) >> 16 << 16);
        if (visible.to % 2 != 0) StoreBits(last + i, LoadBits<VI>(last + i) & 0xffff);
      }
    }
    Product<L, 1>(weights + first, 0, panel, lanes, correction, acc + d, padded_dim);
  }
}

// Takes the tile into the state of rows block .. block + kRowBlock - 1. scores: kRowBlock of kManyTokens, and a panel.
template <class L>
void ManyBlock(const SpanArgs& args, const PackedTile& tile, int block, const float* q, float* scores) {
  const int padded_rows = PaddedRows(args.tile.rows), padded_dim = PaddedDim(args.tile.head_dim);
  const int count = args.tile.rows - block < kRowBlock ? args.tile.rows - block : kRowBlock;
  Visible visible[kRowBlock];
  int from = tile.size, to = 0;
  for (int r = 0; r < count; ++r) {
    visible[r] = VisibleTo(args.positions[block + r], args.window, tile.begin, tile.size);
    if (visible[r].from >= visible[r].to) continue;
    from = visible[r].from < from ? visible[r].from : from;
    to = visible[r].to > to ? visible[r].to : to;
  }
  if (from >= to) return;
  from = from / kPanel * kPanel;
  const int size = to - from;

  const std::int64_t panel_floats = std::int64_t{kPanel} * padded_dim;
  for (int k = 0; k < size; k += kPanel) {
    const float* keys = tile.keys + (from + k) / kPanel * panel_floats;
    for (int d = 0; d < tile.key_lanes; d += kScoreLanes) {
      const int lanes = tile.key_lanes - d < kScoreLanes ? tile.key_lanes - d : kScoreLanes;
      BlockProduct<L>(q + d, padded_dim / L::kElements, keys + d * kPanel, lanes, d == 0 ? nullptr : kOnes, scores + k,
                      kManyTokens);
    }
  }

  bool mixed = size % L::kElements != 0;
  const float* scales = tile.scales == nullptr ? nullptr : tile.scales + from;
  for (int r = 0; r < count; ++r) {
    visible[r].from -= from;
    visible[r].to -= from;
    mixed = mixed || visible[r].from > 0 || visible[r].to < size;
    if (scales != nullptr) ScaleScores(scales, size, scores + r * kManyTokens);
  }
  float correction[kRowBlock];
  for (int r = count; r < kRowBlock; ++r) correction[r] = 1.0f;
  float* max = args.state + padded_rows * padded_dim + block;
  SoftmaxArgs softmax = {args, args.slopes, tile.begin + from, size, kManyTokens};
  if (scales != nullptr) softmax.value_scales = scales + kSpanScales;
  Rests rests = {};
  if (tile.bytes.words != nullptr) {
    rests.value_units = tile.bytes.units + from;
    rests.value_exponents = tile.bytes.exponents + from;
    rests.bytes = tile.bytes.rests;
    softmax.rests = &rests;
  }
  Softmax<L>(softmax, block, count, visible, scores, max, max + padded_rows, max + 2 * padded_rows, correction);

  float* acc = args.state + block * padded_dim;
  if (mixed && !tile.finite) {
    for (int r = 0; r < count; ++r) {
      if (visible[r].from >= visible[r].to) continue;
      CarefulValues<L>(ValuesAt<L>(tile.values, 0, from), visible[r], scores + r * kManyTokens, correction + r,
                       acc + r * padded_dim, padded_dim, scores + kRowBlock * kManyTokens);
    }
  } else {
    for (int d = 0; d < padded_dim; d += kPanel) {
      BlockProduct<L>(scores, kManyTokens, ValuesAt<L>(tile.values, d, from), (size + L::kElements - 1) / L::kElements,
                      correction, acc + d, padded_dim);
    }
  }
  if (softmax.rests != nullptr) AddRests(L{}, rests, tile.bytes, from, size, acc, padded_dim);
}

template <class T, class L>
void ManyTiles(const SpanArgs& args) {
  const int rows = args.tile.rows, head_dim = args.tile.head_dim, padded_dim = PaddedDim(head_dim);
  float* keys = args.scratch;
  float* values = keys + kManyTokens * padded_dim;
  float* scores = values + kManyTokens * padded_dim;
  // As they were loaded: float32 rows, then bfloat16 rows.
  const int row_floats = padded_dim / L::kElements;
  const float* q = args.q + (L::kElements == 1 ? 0 : PaddedRows(rows) * padded_dim);
  // One or two blocks of rows use what is packed once or twice: best while it is in the nearest cache.
  const int tile_tokens = rows <= 2 * kRowBlock ? kManyTokens / 4 : kManyTokens;
  for (std::int64_t begin = args.begin; begin < args.end;) {
    const std::int64_t next = (begin / tile_tokens + 1) * tile_tokens;
    const std::int64_t end = next < args.end ? next : args.end;
    const int size = static_cast<int>(end - begin);
    int first = 0;  // rows before it see nothing from this tile on
    while (first < rows && args.positions[first] < begin) ++first;
    int last = rows;  // rows from it on have their window behind the tile
    if (args.window > 0) {
      while (last > first && args.positions[last - 1] - args.window + 1 >= end) --last;
    }
    first = first / kRowBlock * kRowBlock;
    if (first < last) {
      last = (last + kRowBlock - 1) / kRowBlock * kRowBlock;
      last = last < rows ? last : rows;
      const char* const* tile = args.keys + (begin - args.begin);
      const int key_lanes = head_dim / L::kElements;
      if constexpr (L::kElements == 1) {
        PackKeys<T>(tile, size, key_lanes, std::int64_t{kPanel} * padded_dim, keys);
      } else {  // a pair is a 32-bit lane like any other
        PackKeys<PairsOf<T>>(tile, size, key_lanes, std::int64_t{kPanel} * padded_dim, keys);
      }
      // Unless every row sees all of the tile.
      const bool mixed = size % L::kElements != 0 || args.positions[first] < end - 1 ||
                         (args.window > 0 && args.positions[last - 1] - args.window + 1 > begin);
      PackValues<T>(L{}, tile, args.value_offset, size, head_dim, values);
      PackedTile packed = {begin,
                           size,
                           keys,
                           values,
                           args.scales == nullptr ? nullptr : args.scales + (begin - args.begin),
                           key_lanes,
                           !mixed || FinitePanels<L>(values, size, padded_dim),
                           {}};
      if (args.exact_weights) {  // pairs take half of the room
        float* room = values + kManyTokens * padded_dim / 2;
        packed.bytes = PackBytes(L{}, tile, args.value_offset, size, head_dim, room);
      }
      for (int block = first; block < last; block += kRowBlock) {
        ManyBlock<L>(args, packed, block, q + block * row_floats, scores);
      }
    }
    begin = end;
  }
}

// Whether many rows are multiplied as pairs of bfloat16. What that leaves of weights is known for bfloat16 values only.
KVPAGE_INLINE bool TakesPairs(DType dtype, bool q_is_bf16, bool exact_weights, int head_dim) {
  return KVPAGE_BF16_DOT && q_is_bf16 && head_dim % 2 == 0 &&
         (dtype == DType::kBF16 || (IsQuantized(dtype) && !exact_weights));
}

template <class T>
void AttendMany(const SpanArgs& args) {
#if KVPAGE_BF16_DOT
  if constexpr (kExactInBF16<T>) {
    if (TakesPairs(args.dtype, args.q_is_bf16, args.exact_weights, args.tile.head_dim)) {
      return ManyTiles<T, PairLanes>(args);
    }
  }
#endif
  ManyTiles<T, FloatLanes>(args);
}
