#include "kernels/cpu/context.h"

#include <algorithm>

#include "base/dtype.h"
#include "kernels/cpu/isa.h"

namespace kvpage::cpu {
namespace {

constexpr int kLineBytes = 64;

void Prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace

std::int64_t Context::ChunkEnd(std::int64_t token, std::int64_t end) const {
  return std::min((token / kv_.tokens_per_chunk + 1) * kv_.tokens_per_chunk, end);
}

const char** Context::List(int kv, std::int64_t begin, std::int64_t end, const char** rows) const {
  for (std::int64_t token = begin; token < end;) {
    const std::int64_t chunk_end = ChunkEnd(token, end);
    const char* row = kv_.At(slot_, token, layer_, kv, kv_head_);
    for (; token < chunk_end; ++token, row += kv_.token_stride) *rows++ = row;
  }
  return rows;
}

void Context::LoadScales(std::int64_t begin, std::int64_t end, float* scales) const {
  const float factor = ElementUnit(kv_.dtype);
  for (std::int64_t token = begin; token < end;) {
    const std::int64_t count = ChunkEnd(token, end) - token;
    for (int kind = 0; kind < 2; ++kind) {
      const char* first = reinterpret_cast<const char*>(kv_.Scale(slot_, token, layer_, kind, kv_head_));
      float* to = scales + kind * kSpanScales + (token - begin);
      for (int h = 0; h < heads_; ++h, first += kv_.scale_head_stride, to += 2 * kSpanScales) {
        if (kv_.scale_token_stride == sizeof(float)) {
          const auto* from = reinterpret_cast<const float*>(first);
          for (std::int64_t i = 0; i < count; ++i) to[i] = from[i] * factor;
          continue;
        }
        const char* from = first;
        for (std::int64_t i = 0; i < count; ++i, from += kv_.scale_token_stride) {
          to[i] = *reinterpret_cast<const float*>(from) * factor;
        }
      }
    }
    token += count;
  }
  for (int i = 0; i < 2 * heads_; ++i) {
    float* row = scales + i * kSpanScales;
    std::fill(row + (end - begin), row + std::min<std::int64_t>(end - begin + kLookahead, kSpanScales), 0.0f);
  }
}

void Context::PrefetchKeys(std::int64_t begin, std::int64_t end) const {
  const auto row_bytes = static_cast<std::int64_t>(kv_.head_dim * ItemSize(kv_.dtype));
  for (std::int64_t token = begin; token < end;) {
    const std::int64_t chunk_end = ChunkEnd(token, end);
    const char* key = kv_.At(slot_, token, layer_, 0, kv_head_);
    for (; token < chunk_end; ++token, key += kv_.token_stride) {
      for (int h = 0; h < heads_; ++h) {
        for (std::int64_t at = 0; at < row_bytes; at += kLineBytes) Prefetch(key + h * kv_.head_stride + at);
      }
    }
  }
}

void Context::PrefetchScales(std::int64_t begin, std::int64_t end) const {
  for (std::int64_t token = begin; token < end;) {
    const std::int64_t chunk_end = ChunkEnd(token, end);
    for (int kind = 0; kind < 2; ++kind) {
      for (int h = 0; h < heads_; ++h) {
        const auto at = [&](std::int64_t t) {
          return reinterpret_cast<const char*>(kv_.Scale(slot_, t, layer_, kind, kv_head_ + h));
        };
        const char* last = at(chunk_end - 1);
        for (const char* p = at(token); p < last + kLineBytes - 1; p += kLineBytes) Prefetch(p);
        if (kv_.scale_head_stride < kv_.scale_token_stride) break;  // the scales of the other heads lie in between
      }
    }
    token = chunk_end;
  }
}

}  // namespace kvpage::cpu
