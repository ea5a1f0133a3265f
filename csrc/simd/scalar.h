// Plain C++: always available, what sanitizers and exotic machines run.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd/types.h"

namespace fuserve::FUSERVE_ISA {

// Tokens and tiles of the micro-kernels.
inline constexpr int kFloatTokens = 4;
inline constexpr int kIntegerTokens = 4;
inline constexpr int kTilesAtOnce = 1;
inline constexpr int kByteDotTokens = 4;

struct F32x16 {
  float v[16];
};
struct I32x16 {
  std::int32_t v[16];
};
struct I16x32 {
  ShortPair v[16];
};

template <class F>
inline F32x16 each(F f) {
  F32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}

inline F32x16 set1(float x) {
  return each([&](int) { return x; });
}
inline F32x16 zero() { return set1(0.0F); }
inline F32x16 load16(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline F32x16 load16(const Half* p) {
  return each([&](int i) { return to_float(p[i]); });
}
inline F32x16 load16(const BFloat* p) {
  return each([&](int i) { return to_float(p[i]); });
}
inline F32x16 load16(const std::int8_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
inline void store16(float* p, F32x16 a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store16(Half* p, F32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = to_half(a.v[i]);
}
inline F32x16 load_n(const float* p, int n) {
  return each([&](int i) { return i < n ? p[i] : 0.0F; });
}
inline void store_n(float* p, F32x16 a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}

inline F32x16 add(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x16 sub(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32x16 mul(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 div(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
// max and min: the second operand where one is NaN, as x86 has it.
inline F32x16 max(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 abs(F32x16 a) {
  return each([&](int i) { return std::fabs(a.v[i]); });
}
inline F32x16 sqrt(F32x16 a) {
  return each([&](int i) { return std::sqrt(a.v[i]); });
}
inline F32x16 round(F32x16 a) {
  return each([&](int i) { return std::nearbyint(a.v[i]); });
}
// 2^n for integral n in [-126, 127], and 0 for -127.
inline F32x16 pow2(F32x16 n) {
  return each([&](int i) {
    const auto bits = static_cast<std::uint32_t>(static_cast<std::int32_t>(n.v[i]) + 127) << 23;
    float r;
    std::memcpy(&r, &bits, sizeof r);
    return r;
  });
}
// Values of [0.5, 2) times 2^n, of n + 1.5 * 2^23.
inline F32x16 times_pow2(F32x16 a, F32x16 n) {
  return each([&](int i) {
    const std::uint32_t exponent = std::bit_cast<std::uint32_t>(n.v[i]) << 23;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(a.v[i]) + exponent);
  });
}
// Lanes in [first, last) of a, the others `fill`.
inline F32x16 keep(F32x16 a, int first, int last, float fill) {
  return each([&](int i) { return i >= first && i < last ? a.v[i] : fill; });
}
// a, or 0 where x < limit.
inline F32x16 zero_where_below(F32x16 a, F32x16 x, F32x16 limit) {
  return each([&](int i) { return x.v[i] < limit.v[i] ? 0.0F : a.v[i]; });
}
// A bit for each lane where x > limit.
inline std::uint32_t lanes_above(F32x16 x, F32x16 limit) {
  std::uint32_t lanes = 0;
  for (int i = 0; i < 16; ++i) lanes |= static_cast<std::uint32_t>(x.v[i] > limit.v[i]) << i;
  return lanes;
}
inline F32x16 copysign(F32x16 magnitude, F32x16 sign) {
  return each([&](int i) { return std::copysign(magnitude.v[i], sign.v[i]); });
}

inline float first_lane(F32x16 a) { return a.v[0]; }
// Sums lanes i and i+8 first, then halves again: the same order in every instruction set.
inline float reduce_add(F32x16 a) {
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = a.v[i] + a.v[i + 8];
  for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
  return (s[0] + s[2]) + (s[1] + s[3]);
}
inline float reduce_max(F32x16 a) {
  float m = a.v[0];
  for (int i = 1; i < 16; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

inline I32x16 to_int(F32x16 a) {
  I32x16 r;
  for (int i = 0; i < 16; ++i) {
    const float x = std::nearbyint(a.v[i]);
    r.v[i] = x >= -2147483648.0F && x < 2147483648.0F ? static_cast<std::int32_t>(x) : INT32_MIN;
  }
  return r;
}
inline I32x16 load_i32(const void* p) {
  I32x16 r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_i32(void* p, I32x16 a) { std::memcpy(p, a.v, sizeof a.v); }
// Byte `index` of each lane, sign extended.
inline I32x16 signed_byte(I32x16 a, int index) {
  I32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<std::int8_t>(a.v[i] >> 8 * index);
  return r;
}
// The low or high nibble of byte `index` of each lane.
inline I32x16 nibble(I32x16 a, int index, bool high) {
  I32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] >> (8 * index + (high ? 4 : 0)) & 15;
  return r;
}
// Byte `index` of each lane.
inline I32x16 unsigned_byte(I32x16 a, int index) {
  I32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] >> 8 * index & 255;
  return r;
}
inline I32x16 set1_i32(std::int32_t x) {
  I32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = x;
  return r;
}
inline I32x16 add(I32x16 a, I32x16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline I32x16 sub(I32x16 a, I32x16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
// A quarter of each, rounded down.
inline I32x16 quarter(I32x16 a) {
  for (int i = 0; i < 16; ++i) a.v[i] >>= 2;
  return a;
}
inline F32x16 to_float(I32x16 a) {
  return each([&](int i) { return static_cast<float>(a.v[i]); });
}
inline std::int32_t reduce_add(I32x16 a) {
  std::int32_t s = 0;
  for (int i = 0; i < 16; ++i) s += a.v[i];
  return s;
}
// Values in [-128, 127], or saturated.
inline void store_i8(std::int8_t* p, I32x16 a) {
  for (int i = 0; i < 16; ++i) {
    const std::int32_t x = a.v[i] < -128 ? -128 : a.v[i] > 127 ? 127 : a.v[i];
    p[i] = static_cast<std::int8_t>(x);
  }
}

// Values within 16 bits.
inline void store_i16(ShortPair* p, I32x16 a) {
  for (int i = 0; i < 16; i += 2)
    p[i / 2] = {static_cast<std::int16_t>(a.v[i]), static_cast<std::int16_t>(a.v[i + 1])};
}
// Values within 16 bits, beside each other.
inline I16x32 pairs(I32x16 first, I32x16 second) {
  I16x32 r;
  for (int i = 0; i < 16; ++i)
    r.v[i] = {static_cast<std::int16_t>(first.v[i]), static_cast<std::int16_t>(second.v[i])};
  return r;
}
// 32 bytes, and 32 that are q + 128.
inline I16x32 widen(const std::int8_t* p) {
  I16x32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = {p[2 * i], p[2 * i + 1]};
  return r;
}
inline I16x32 widen_codes(const std::uint8_t* p) {
  I16x32 r;
  for (int i = 0; i < 16; ++i)
    r.v[i] = {static_cast<std::int16_t>(p[2 * i] - 128),
              static_cast<std::int16_t>(p[2 * i + 1] - 128)};
  return r;
}
inline I16x32 set1(ShortPair x) {
  I16x32 r;
  for (ShortPair& pair : r.v) pair = x;
  return r;
}
inline I16x32 load16(const ShortPair* p) {
  I16x32 r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store16(ShortPair* p, I16x32 a) { std::memcpy(p, a.v, sizeof a.v); }
inline I16x32 add(I16x32 a, I16x32 b) {
  for (int i = 0; i < 16; ++i) {
    a.v[i].first = static_cast<std::int16_t>(a.v[i].first + b.v[i].first);
    a.v[i].second = static_cast<std::int16_t>(a.v[i].second + b.v[i].second);
  }
  return a;
}
inline I16x32 sub(I16x32 a, I16x32 b) {
  for (int i = 0; i < 16; ++i) {
    a.v[i].first = static_cast<std::int16_t>(a.v[i].first - b.v[i].first);
    a.v[i].second = static_cast<std::int16_t>(a.v[i].second - b.v[i].second);
  }
  return a;
}
// The pairs of a and b that stand first, or second, in each two of them.
inline I16x32 first_pairs(I16x32 a, I16x32 b) {
  I16x32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = i < 8 ? a.v[2 * i] : b.v[2 * i - 16];
  return r;
}
inline I16x32 second_pairs(I16x32 a, I16x32 b) {
  I16x32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = i < 8 ? a.v[2 * i + 1] : b.v[2 * i - 15];
  return r;
}
// Each pair's products, with c.
inline I32x16 fma(I16x32 a, I16x32 b, I32x16 c) {
  for (int i = 0; i < 16; ++i)
    c.v[i] += a.v[i].first * b.v[i].first + a.v[i].second * b.v[i].second;
  return c;
}

inline void prefetch(const void*) {}

// out[r][t][row] = sum over 32 features of w[row][k] * a[t][k] for one q4 block of each of R tiles.
template <int T, int R>
inline void dot_q4(const std::uint8_t* w, std::ptrdiff_t tile_stride, const std::int8_t* a,
                   std::ptrdiff_t stride, I32x16 (&out)[R][T]) {
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t)
      for (int row = 0; row < 16; ++row) {
        std::int32_t s = 0;
        for (int j = 0; j < 4; ++j)
          for (int i = 0; i < 4; ++i) {
            const int byte = w[r * tile_stride + 64 * j + 4 * row + i];
            const std::int8_t* x = a + t * stride + 8 * j + i;
            s += (byte & 15) * x[0] + (byte >> 4) * x[4];
          }
        out[r][t].v[row] = s;
      }
}
// The same for q8 blocks.
template <int T, int R>
inline void dot_q8(const std::int8_t* w, std::ptrdiff_t tile_stride, const std::int8_t* a,
                   std::ptrdiff_t stride, I32x16 (&out)[R][T]) {
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t)
      for (int row = 0; row < 16; ++row) {
        std::int32_t s = 0;
        for (int j = 0; j < 8; ++j)
          for (int i = 0; i < 4; ++i)
            s += w[r * tile_stride + 64 * j + 4 * row + i] * a[t * stride + 4 * j + i];
        out[r][t].v[row] = s;
      }
}

// The low and the high nibbles of 16 bytes, less `zero`.
inline void split_16_bytes(const void* p, int zero, std::int8_t* low, std::int8_t* high) {
  for (int i = 0; i < 16; ++i) {
    const int byte = static_cast<const std::uint8_t*>(p)[i];
    low[i] = static_cast<std::int8_t>((byte & 15) - zero);
    high[i] = static_cast<std::int8_t>((byte >> 4) - zero);
  }
}

// add_byte_dot sums in 32 bits, but rows are cut as AVX2 wants them, so that sanitizers see it.
inline constexpr int kQuadsPerSum = 2;

// A bit for each eight of 32 values: whether those of one sign in features 0 and 1, or 2 and 3, of
// one quad or of both of its quads sum to more than 128.
template <int Quads>
inline std::uint32_t overflowing_eights(const std::int8_t* a) {
  std::uint32_t eights = 0;
  for (int first = 0; first < 32; first += 4 * Quads)
    for (int pair = first; pair < first + 4; pair += 2) {
      int positive = 0, negative = 0;
      for (int k = pair; k < pair + 4 * Quads; k += 4)
        for (int i = 0; i < 2; ++i) (a[k + i] > 0 ? positive : negative) += a[k + i];
      if (positive > 128 || negative < -128) eights |= 1U << (first / 8);
    }
  return eights;
}

// What add_byte_dot's sums must begin with, for each unit of the sum of the activations, negated.
inline constexpr int kByteDotOffset = 0;

// acc[row] += sum over a quad of q[row][k] * a[k], of bytes that are q + 128.
inline void add_byte_quad(const std::uint8_t* w, const std::int8_t* a, I32x16& acc) {
  for (int row = 0; row < 16; ++row)
    for (int i = 0; i < 4; ++i) acc.v[row] += (w[4 * row + i] - 128) * a[i];
}

// acc[r][t][row] += sum over 32 features of q[row][k] * a[t][k] for one block of each of R tiles,
// whose bytes are q + 128.
template <int Quads, int T, int R>
inline void add_byte_dot(const std::uint8_t* w, std::ptrdiff_t tile_stride, const std::int8_t* a,
                         std::ptrdiff_t stride, I32x16 (&acc)[R][T]) {
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t)
      for (int k = 0; k < 32; ++k)
        for (int row = 0; row < 16; ++row)
          acc[r][t].v[row] +=
              (w[r * tile_stride + k / 4 * 64 + 4 * row + k % 4] - 128) * a[t * stride + k];
}

}  // namespace fuserve::FUSERVE_ISA
