// Writing one token's key or value into its slot of a cache block.
#pragma once

#include <cmath>

#include "attention/attention.h"
#include "attention/nibbles.h"

namespace fuserve::FUSERVE_ISA {

// Scale of integers up to `highest` that stand for a row; NaN where the row holds a NaN or an
// infinity, so that it reaches what is computed from it.  row: [padded_head_dim]
inline float integer_scale(const float* row, int padded, float highest) {
  F32x16 largest = zero(), poison = zero();
  for (int d = 0; d < padded; d += 16) {
    const F32x16 x = load16(row + d);
    largest = max(largest, abs(x));
    poison = fma(x, zero(), poison);
  }
  return reduce_max(largest) * (1.0F / highest) + reduce_add(poison);
}

inline void store_row(float* out, const float* row, int padded, float) {
  std::copy_n(row, padded, out);
}
inline void store_row(Half* out, const float* row, int padded, float) {
  for (int d = 0; d < padded; d += 16) store16(out + d, load16(row + d));
}
inline void store_row(std::int8_t* out, const float* row, int padded, float scale) {
  const F32x16 inverse = set1(scale > 0.0F ? 1.0F / scale : 0.0F);
  for (int d = 0; d < padded; d += 16)
    store_i8(out + d, to_int8_range(mul(load16(row + d), inverse)));
}

// The largest head that is transposed on the stack, a piece at a time.
inline constexpr int kAppendPiece = 128;

template <class T>
void append_typed(const KVCache& cache, int layer, int block, int kv_head, int slot,
                  const float* row, bool is_value) {
  const CachedHead<T> head(cache, layer, block, kv_head);
  const int padded = cache.padded_head_dim;
  float scale = 0.0F;
  if constexpr (std::is_same_v<T, std::int8_t>) {
    scale = integer_scale(row, padded, 127.0F);
    (is_value ? head.value_scales : head.key_scales)[slot] = scale;
  }
  if (is_value) return store_row(head.values + slot * padded, row, padded, scale);
  T piece[kAppendPiece];
  for (int first = 0; first < padded; first += kAppendPiece) {
    const int count = std::min(kAppendPiece, padded - first);
    store_row(piece, row + first, count, scale);
    T* out = head.keys + first * kBlockTokens + slot;
    for (int d = 0; d < count; ++d) out[d * kBlockTokens] = piece[d];
  }
}

inline void append_nibbles(const KVCache& cache, int layer, int block, int kv_head, int slot,
                           const float* row, bool is_value) {
  const CachedHead<Nibbles> head(cache, layer, block, kv_head);
  const int padded = cache.padded_head_dim;
  const float scale = integer_scale(row, padded, 7.0F);
  (is_value ? head.value_scales : head.key_scales)[slot] = scale;
  // Partners are one feature apart in a key, half of them in a value.
  const int apart = is_value ? padded / 2 : 1, step = is_value ? 1 : 2;
  Nibbles* out = is_value ? head.values + slot * padded / 2 : head.keys + slot;
  const int out_step = is_value ? 1 : kBlockTokens;
  const float inverse = scale > 0.0F ? 1.0F / scale : 0.0F;
  const auto code = [&](int d) {
    const float q = std::nearbyint(row[d] * inverse);
    return static_cast<std::int8_t>(q < -7.0F ? -7.0F : q <= 7.0F ? q : 7.0F);
  };
  for (int i = 0; i < padded / 2; ++i)
    out[i * out_step] = join_nibbles(code(i * step), code(i * step + apart));
}

// row: [padded_head_dim]
inline void append(const KVCache& cache, int layer, int block, int kv_head, int slot,
                   const float* row, bool is_value) {
  switch (cache.type) {
    case CacheType::f32:
      return append_typed<float>(cache, layer, block, kv_head, slot, row, is_value);
    case CacheType::f16:
      return append_typed<Half>(cache, layer, block, kv_head, slot, row, is_value);
    case CacheType::i8:
      return append_typed<std::int8_t>(cache, layer, block, kv_head, slot, row, is_value);
    case CacheType::i4:
      return append_nibbles(cache, layer, block, kv_head, slot, row, is_value);
  }
}

}  // namespace fuserve::FUSERVE_ISA
