// Keys and values in four bits, to and from int8. A byte holds two values of one token, so that
// threads that append different tokens to a block never write to the same byte.
#pragma once

#include <cstdint>

#include "attention/attention_types.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// out[i] and out[count + i] of the low and the high nibbles of `count` bytes.
inline void split_nibbles(const Nibbles* packed, int count, std::int8_t* out) {
  int i = 0;
  for (; i + 16 <= count; i += 16)
    split_16_bytes(packed + i, kNibbleZero, out + i, out + count + i);
  for (; i < count; ++i) {
    const int byte = static_cast<int>(packed[i]);
    out[i] = static_cast<std::int8_t>((byte & 15) - kNibbleZero);
    out[count + i] = static_cast<std::int8_t>((byte >> 4) - kNibbleZero);
  }
}

inline Nibbles join_nibbles(std::int8_t low, std::int8_t high) {
  return static_cast<Nibbles>((low + kNibbleZero) | (high + kNibbleZero) << 4);
}

// A head's keys and values as int8: keys [padded][32], then values [32][padded]. Meanwhile as many
// bytes are fetched from `next`; null fetches nothing.
inline void unpack_head(const CachedHead<Nibbles>& head, int padded, const char* next,
                        std::int8_t* out) {
  const auto fetch = [&](int bytes) {
    if (next == nullptr) return;
    for (int line = 0; line < bytes; line += 64) prefetch(next + line);
    next += bytes;
  };
  for (int d = 0; d < padded; d += 2) {
    if (d % 4 == 0) fetch(2 * kBlockTokens);
    split_nibbles(head.keys + d / 2 * kBlockTokens, kBlockTokens, out + d * kBlockTokens);
  }
  out += padded * kBlockTokens;
  for (int token = 0; token < kBlockTokens; ++token) {
    if (token % 2 == 0) fetch(padded);
    split_nibbles(head.values + token * padded / 2, padded / 2, out + token * padded);
  }
}

}  // namespace fuserve::FUSERVE_ISA
