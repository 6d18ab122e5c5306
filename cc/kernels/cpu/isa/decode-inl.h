// Few query rows (decode): every key and value is read from memory once, as it lies there, and all rows use it while it
// is in registers. Scores are dot products along the head, weights times values run along the head too.

// How far ahead of its use memory is asked for: this many bytes of rows of one head, or of all heads that are walked
// together, but no fewer rows than that, and no more than a tile. The second-level cache is the target: more requests
// can be under way there than in the first level, which made the difference between half and all of the speed of
// memory.
constexpr int kPrefetchBytes = 8192;
constexpr int kPrefetchBytesOfHeads = 131072;
constexpr int kPrefetchRows = 24;

KVPAGE_INLINE void Prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// The rows of a whole tile are taken in the order 0, 16, 32, 48, 1, 17, ...: as several streams, each in pages of its
// own. The processor follows each of them by itself, beside what is prefetched, and so keeps more requests under way.
constexpr int kStreams = 4;
KVPAGE_INLINE int Woven(int i, int length) { return i % kStreams * length + i / kStreams; }

// Lists a span's keys so: whole tiles woven, the rest and what is read next as it is. walk: room for all of them.
KVPAGE_INLINE void ListWoven(const SpanArgs& args, const char** walk) {
  const auto readable = static_cast<int>(args.readable - args.begin);
  for (int i = 0; i < readable;) {
    if ((args.begin + i) % kTileTokens == 0 && i + kTileTokens <= readable) {
      for (int k = 0; k < kTileTokens; ++k) walk[i + k] = args.keys[i + Woven(k, kTileTokens / kStreams)];
      i += kTileTokens;
    } else {
      walk[i] = args.keys[i];
      ++i;
    }
  }
}

// Values are weighted and summed this many at a time, over the whole head: sums stay short, and memory is read nearly
// as it lies. The same for every layout, because it shows in the last bits of a result.
constexpr int kValueRows = 16;

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f(r, Count<R>) for groups of R of the rows.
template <class F>
KVPAGE_INLINE void ForRowGroups(int rows, const F& f) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) f(r, Count<4>{});
  if (rows & 2) f(r, Count<2>{});
  r += rows & 2;
  if (rows & 1) f(r, Count<1>{});
}

// Keys, and at value_offset from them values, of a tile, in the order in which they are read.
struct TileRows {
  const char* const* rows;
  std::int64_t key_offset;
  std::int64_t value_offset;
  int size;
  int readable;  // rows from `size` on are the next tile's keys
  int ahead;     // how many rows ahead to prefetch, at most kTileTokens
  int heads;     // walked together, head_stride apart
  std::int64_t head_stride;
};

// The row that is read `ahead` rows after key (or value) i of the tile: keys, then values, then the next tile's keys.
// It is prefetched a line at a time between the arithmetic: in a burst the requests would hold up the loads.
KVPAGE_INLINE const char* RowAfterKey(const TileRows& tile, int i) {
  i += tile.ahead;
  if (i < tile.size) return tile.rows[i] + tile.key_offset;
  return tile.rows[i - tile.size < tile.size ? i - tile.size : tile.size - 1] + tile.value_offset;
}
KVPAGE_INLINE const char* RowAfterValue(const TileRows& tile, int i) {
  if (i + tile.ahead < tile.size) return tile.rows[i + tile.ahead] + tile.value_offset;
  if (i + tile.ahead < tile.readable) return tile.rows[i + tile.ahead] + tile.key_offset;
  return tile.rows[i] + tile.value_offset;
}

// Lane r * K + j of sums is the score of row r for the tile's key i + j.
template <int R>
KVPAGE_INLINE void StoreScores(VF sums, float* scores) {
  constexpr int K = W / R;
  float lanes[W];
  StoreFloats(lanes, sums);
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) __builtin_memcpy(scores + r * kTileTokens, lanes + r * K, K * 4);
}

// scores[heads][R, kTileTokens] of R query rows against the keys of a tile.
template <class T, int R>
KVPAGE_NOINLINE void FewScores(const TileRows& tile, const float* queries, std::int64_t q_stride, int padded_dim,
                               int head_dim, float* head_scores, std::int64_t scores_stride) {
  constexpr int K = W / R;
  for (int i = 0; i < tile.size; i += K) {
    for (int h = 0; h < tile.heads; ++h) {
      const float* q = queries + h * q_stride;
      const std::int64_t offset = h * tile.head_stride;
      const char* key[K];
      KVPAGE_UNROLL for (int j = 0; j < K; ++j) {
        key[j] = tile.rows[i + j < tile.size ? i + j : tile.size - 1] + tile.key_offset + offset;
      }
      const char* ahead[K];
      KVPAGE_UNROLL for (int j = 0; j < K; ++j) ahead[j] = RowAfterKey(tile, i + j) + offset;
      VF acc[W];
      KVPAGE_UNROLL for (int a = 0; a < W; ++a) acc[a] = VF{};
      for (int d = 0; d < head_dim; d += W) {
        VF x[K];
        KVPAGE_UNROLL for (int j = 0; j < K; ++j) x[j] = LoadAs(T{}, key[j] + d * T::kSize);
        if (d * T::kSize % 64 == 0) {
          KVPAGE_UNROLL for (int j = 0; j < K; ++j) Prefetch(ahead[j] + d * T::kSize);
        }
        KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
          const VF y = LoadFloats(q + r * padded_dim + d);
          KVPAGE_UNROLL for (int j = 0; j < K; ++j) acc[r * K + j] = Fma(x[j], y, acc[r * K + j]);
        }
      }
      StoreScores<R>(SumEach(acc), head_scores + h * scores_stride + i);
    }
  }
}

#if KVPAGE_BF16_DOT
// The same for bfloat16 queries: pairs are multiplied as they are and summed in float32.
template <int R>
KVPAGE_NOINLINE void FewScoresPairs(const TileRows& tile, const float* queries, std::int64_t q_stride, int padded_dim,
                                    int head_dim, float* head_scores, std::int64_t scores_stride) {
  constexpr int K = W / R;
  for (int i = 0; i < tile.size; i += K) {
    for (int h = 0; h < tile.heads; ++h) {
      const auto* q = reinterpret_cast<const std::uint16_t*>(queries + h * q_stride);
      const std::int64_t offset = h * tile.head_stride;
      const char* key[K];
      KVPAGE_UNROLL for (int j = 0; j < K; ++j) {
        key[j] = tile.rows[i + j < tile.size ? i + j : tile.size - 1] + tile.key_offset + offset;
      }
      const char* ahead[K];
      KVPAGE_UNROLL for (int j = 0; j < K; ++j) ahead[j] = RowAfterKey(tile, i + j) + offset;
      VF acc[W];
      KVPAGE_UNROLL for (int a = 0; a < W; ++a) acc[a] = VF{};
      for (int d = 0; d + 2 * W <= head_dim; d += 2 * W) {
        VI x[K];
        KVPAGE_UNROLL for (int j = 0; j < K; ++j) x[j] = LoadBits<VI>(key[j] + d * 2);
        KVPAGE_UNROLL for (int j = 0; j < K; ++j) Prefetch(ahead[j] + d * 2);
        KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
          const VI y = LoadBits<VI>(q + r * padded_dim + d);
          KVPAGE_UNROLL for (int j = 0; j < K; ++j) acc[r * K + j] = DotPairs(acc[r * K + j], x[j], y);
        }
      }
      if (head_dim % (2 * W) != 0) {  // half a vector is left: head_dim is a multiple of W here
        const int d = head_dim - W;
        KVPAGE_UNROLL for (int j = 0; j < K; ++j) {
          const VI x = (VI)_mm512_zextsi256_si512(LoadBits<__m256i>(key[j] + d * 2));
          KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
            acc[r * K + j] = DotPairs(acc[r * K + j], x, LoadBits<VI>(q + r * padded_dim + d));
          }
        }
      }
      StoreScores<R>(SumEach(acc), head_scores + h * scores_stride + i);
    }
  }
}
#endif

// Accumulators of bfloat16 values hold every whole group of 2 W elements as LoadPairs gives them, until the span ends.
template <class T>
constexpr bool kPaired = false;
template <>
constexpr bool kPaired<BF16> = true;

void Unpair(float* acc, int head_dim) {
  for (int d = 0; d + 2 * W <= head_dim; d += 2 * W) {
    const VF even = LoadFloats(acc + d), odd = LoadFloats(acc + d + W);
    StoreFloats(acc + d, ZipLow(even, odd));
    StoreFloats(acc + d + W, ZipHigh(even, odd));
  }
}

// acc[R, d .. d + V * W) = acc * correction + weights[R, from .. to) * values.
template <class T, int R, int V>
KVPAGE_NOINLINE void FewValues(const TileRows& tile, std::int64_t offset, int from, int to, int d, const float* weights,
                               const float* correction, float* acc, int padded_dim) {
  VF sum[R][V];
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) { KVPAGE_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = VF{}; }
  offset += d * T::kSize;
  for (int i = from; i < to; ++i) {
    const char* value = tile.rows[i] + tile.value_offset + offset;
    const char* ahead = RowAfterValue(tile, i) + offset;
    KVPAGE_UNROLL for (int line = 0; line < V * W * T::kSize; line += 64) Prefetch(ahead + line);
    VF x[V];
    if constexpr (kPaired<T> && V % 2 == 0) {
      KVPAGE_UNROLL for (int v = 0; v < V; v += 2) LoadPairs(value + v * W * T::kSize, &x[v], &x[v + 1]);
    } else {
      KVPAGE_UNROLL for (int v = 0; v < V; ++v) x[v] = LoadAs(T{}, value + v * W * T::kSize);
    }
    KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
      const VF p = Splat(weights[r * kTileTokens + i]);
      KVPAGE_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = Fma(x[v], p, sum[r][v]);
    }
  }
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
    const VF keep = Splat(correction[r]);
    KVPAGE_UNROLL for (int v = 0; v < V; ++v) {
      float* to = acc + r * padded_dim + d + v * W;
      StoreFloats(to, Fma(LoadFloats(to), keep, sum[r][v]));
    }
  }
}

template <class T, int R>
KVPAGE_INLINE void FewValuesAll(const TileRows& tile, std::int64_t offset, int from, int to, const float* weights,
                                const float* correction, float* acc, int padded_dim, int head_dim) {
  constexpr int V = W == 16 ? (R == 4 ? 4 : 8) : 8 / R;
  int d = 0;
  for (; d + V * W <= head_dim; d += V * W) {
    FewValues<T, R, V>(tile, offset, from, to, d, weights, correction, acc, padded_dim);
  }
  for (; d + 2 * W <= head_dim; d += 2 * W) {
    FewValues<T, R, 2>(tile, offset, from, to, d, weights, correction, acc, padded_dim);
  }
  if (d < head_dim) FewValues<T, R, 1>(tile, offset, from, to, d, weights, correction, acc, padded_dim);
}

// Converts a tile to zero-padded float32 rows, for head sizes that are no whole number of vectors: a vector load past
// the end of a row could touch memory that is not there.
template <class T>
void StageTile(const char* const* rows, std::int64_t offset, int size, int head_dim, float* dst,
               const char** dst_rows) {
  const int padded_dim = PaddedDim(head_dim);
  const int whole = head_dim / W * W;
  for (int i = 0; i < size; ++i) {
    const char* src = rows[i] + offset;
    float* out = dst + i * padded_dim;
    int d = 0;
    for (; d < whole; d += W) StoreFloats(out + d, LoadAs(T{}, src + d * T::kSize));
    if (d < head_dim) {
      char rest[W * T::kSize] = {};
      __builtin_memcpy(rest, src + d * T::kSize, (head_dim - d) * T::kSize);
      StoreFloats(out + d, LoadAs(T{}, rest));
      d += W;
    }
    for (; d < padded_dim; d += W) StoreFloats(out + d, VF{});
    dst_rows[i] = reinterpret_cast<const char*>(out);
  }
}

// One tile of tile.heads KV heads from `head` on; keys and values lie as T in whole vectors.
template <class T>
void FewTile(const SpanArgs& args, TileRows tile, const char* const* woven, std::int64_t begin, int head,
             float* scores) {
  const int rows = args.tile.rows, head_dim = (args.tile.head_dim + W - 1) / W * W;
  const int padded_dim = PaddedDim(args.tile.head_dim);
  const std::int64_t q_stride = QueryFloats(rows, args.tile.head_dim), scores_stride = rows * kTileTokens;
  const float* q = args.q + head * q_stride;
  Visible visible[kFewRows];
  bool mixed = false;
  for (int r = 0; r < rows; ++r) {
    visible[r] = VisibleTo(args.positions[r], args.window, begin, tile.size);
    mixed = mixed || visible[r].from > 0 || visible[r].to < tile.size;
  }
  if (woven != nullptr && !mixed && tile.size == kTileTokens && args.slopes == nullptr && args.scales == nullptr)
    tile.rows = woven;
  bool pairs = false;
#if KVPAGE_BF16_DOT
  if constexpr (T::kSize == 2) {
    pairs = args.dtype == DType::kBF16 && args.q_is_bf16;
    if (pairs) {
      const float* q16 = q + rows * padded_dim;
      ForRowGroups(rows, [&](int r, auto count) {
        FewScoresPairs<decltype(count)::value>(tile, q16 + r * padded_dim / 2, q_stride, padded_dim, head_dim,
                                               scores + r * kTileTokens, scores_stride);
      });
    }
  }
#endif
  if (!pairs) {
    ForRowGroups(rows, [&](int r, auto count) {
      FewScores<T, decltype(count)::value>(tile, q + r * padded_dim, q_stride, padded_dim, head_dim,
                                           scores + r * kTileTokens, scores_stride);
    });
  }

  float correction[kMaxHeads * kFewRows];
  bool finite[kMaxHeads];
  const std::int64_t state_stride = StateFloats(rows, args.tile.head_dim);
  for (int h = 0; h < tile.heads; ++h) {
    float* weights = scores + h * scores_stride;
    float* max = args.state + (head + h) * state_stride + rows * padded_dim;
    const float* slopes = args.slopes == nullptr ? nullptr : args.slopes + (head + h) * args.tile.group;
    const float* scales =
        args.scales == nullptr ? nullptr : args.scales + (head + h) * 2 * kSpanScales + (begin - args.begin);
    for (int r = 0; scales != nullptr && r < rows; ++r) ScaleScores(scales, tile.size, weights + r * kTileTokens);
    SoftmaxArgs softmax = {args, slopes, begin, tile.size};
    if (scales != nullptr) softmax.value_scales = scales + kSpanScales;
    Softmax(softmax, 0, rows, visible, weights, max, max + rows, correction + h * kFewRows);
    finite[h] = !mixed || AllFinite<T>(tile.rows, tile.value_offset + h * tile.head_stride, tile.size, head_dim);
  }

  for (int i = 0; i < tile.size; i += kValueRows) {
    const int end = i + kValueRows < tile.size ? i + kValueRows : tile.size;
    for (int h = 0; h < tile.heads; ++h) {
      const float* weights = scores + h * scores_stride;
      float* acc = args.state + (head + h) * state_stride;
      float* keep = correction + h * kFewRows;
      const std::int64_t offset = h * tile.head_stride;
      if (!finite[h]) {
        for (int r = 0; r < rows; ++r) {
          FewValuesAll<T, 1>(tile, offset, visible[r].from > i ? visible[r].from : i,
                             visible[r].to < end ? visible[r].to : end, weights + r * kTileTokens, keep + r,
                             acc + r * padded_dim, padded_dim, head_dim);
        }
      } else {
        ForRowGroups(rows, [&](int r, auto count) {
          FewValuesAll<T, decltype(count)::value>(tile, offset, i, end, weights + r * kTileTokens, keep + r,
                                                  acc + r * padded_dim, padded_dim, head_dim);
        });
      }
      for (int r = 0; r < rows; ++r) keep[r] = 1.0f;
    }
  }
}

template <class T>
void AttendFew(const SpanArgs& args) {
  const int rows = args.tile.rows, head_dim = args.tile.head_dim, padded_dim = PaddedDim(head_dim);
  float* scores = args.scratch;
  float* staged = scores + args.heads * PaddedRows(rows) * (kTileTokens + 1);
  const char* staged_rows[2 * kTileTokens];
  const char* walk[kSpanTokens + kLookahead];
  ListWoven(args, walk);
  for (std::int64_t begin = args.begin; begin < args.end;) {
    const std::int64_t next = (begin / kTileTokens + 1) * kTileTokens;
    const std::int64_t end = next < args.end ? next : args.end;
    const int size = static_cast<int>(end - begin);
    const char* const* keys = args.keys + (begin - args.begin);
    if (head_dim % W == 0) {
      TileRows tile = {keys, 0,          args.value_offset, size, static_cast<int>(args.readable - begin),
                       0,    args.heads, args.head_stride};
      const int ahead = (args.heads > 1 ? kPrefetchBytesOfHeads : kPrefetchBytes) / (args.heads * head_dim * T::kSize);
      tile.ahead = ahead < kPrefetchRows ? kPrefetchRows : (ahead < kTileTokens ? ahead : kTileTokens);
      FewTile<T>(args, tile, walk + (begin - args.begin), begin, 0, scores);
    } else {
      for (int h = 0; h < args.heads; ++h) {
        const std::int64_t offset = h * args.head_stride;
        const std::int64_t value_distance = static_cast<std::int64_t>(kTileTokens) * padded_dim * 4;
        StageTile<T>(keys, offset, size, head_dim, staged, staged_rows);
        StageTile<T>(keys, offset + args.value_offset, size, head_dim, staged + kTileTokens * padded_dim,
                     staged_rows + kTileTokens);
        const TileRows tile = {staged_rows, 0, value_distance, size, 0, kTileTokens, 1, 0};
        FewTile<F32>(args, tile, nullptr, begin, h, scores);
      }
    }
    begin = end;
  }
  if (kPaired<T> && head_dim % W == 0) {
    for (int h = 0; h < args.heads; ++h) {
      for (int r = 0; r < rows; ++r) Unpair(args.state + h * StateFloats(rows, head_dim) + r * padded_dim, head_dim);
    }
  }
}
