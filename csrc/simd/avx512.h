// AVX-512 F, BW, VL, DQ and VNNI: sixteen lanes are one register.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd/sse2.h"
#include "simd/types.h"

namespace fuserve::FUSERVE_ISA {

// Tokens and tiles of the micro-kernels: as many as thirty-two registers hold sums for. Two tiles
// share each broadcast of activations, or loads would be the limit.
inline constexpr int kFloatTokens = 12;
inline constexpr int kIntegerTokens = 4;
inline constexpr int kTilesAtOnce = 2;
inline constexpr int kByteDotTokens = 12;

struct F32x16 {
  __m512 v;
};
struct I32x16 {
  __m512i v;
};
struct I16x32 {
  __m512i v;
};

inline F32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 zero() { return {_mm512_setzero_ps()}; }
inline F32x16 load16(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32x16 load16(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F32x16 load16(const BFloat* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
inline F32x16 load16(const std::int8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x))};
}
inline void store16(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline void store16(Half* p, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __mmask16 lanes_below(int n) {
  return static_cast<__mmask16>(n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1 << n) - 1);
}
inline F32x16 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes_below(n), p)}; }
inline void store_n(float* p, F32x16 a, int n) { _mm512_mask_storeu_ps(p, lanes_below(n), a.v); }

inline F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 abs(F32x16 a) { return {_mm512_abs_ps(a.v)}; }
inline F32x16 sqrt(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline F32x16 round(F32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^n for integral n in [-126, 127], and 0 for -127.
inline F32x16 pow2(F32x16 n) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
}
// Values of [0.5, 2) times 2^n, of n + 1.5 * 2^23.
inline F32x16 times_pow2(F32x16 a, F32x16 n) {
  const __m512i exponents = _mm512_slli_epi32(_mm512_castps_si512(n.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), exponents))};
}
// Lanes in [first, last) of a, the others `fill`.
inline F32x16 keep(F32x16 a, int first, int last, float fill) {
  const auto m = static_cast<__mmask16>(lanes_below(last) & ~lanes_below(first));
  return {_mm512_mask_blend_ps(m, _mm512_set1_ps(fill), a.v)};
}
// a, or 0 where x < limit.
inline F32x16 zero_where_below(F32x16 a, F32x16 x, F32x16 limit) {
  const __mmask16 below = _mm512_cmp_ps_mask(x.v, limit.v, _CMP_LT_OQ);
  return {_mm512_mask_blend_ps(below, a.v, _mm512_setzero_ps())};
}
// A bit for each lane where x > limit.
inline std::uint32_t lanes_above(F32x16 x, F32x16 limit) {
  return _mm512_cmp_ps_mask(x.v, limit.v, _CMP_GT_OQ);
}
inline F32x16 copysign(F32x16 magnitude, F32x16 sign) {
  const __m512 bit = _mm512_set1_ps(-0.0F);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, magnitude.v), _mm512_and_ps(bit, sign.v))};
}

inline float first_lane(F32x16 a) { return _mm512_cvtss_f32(a.v); }
// Sums lanes i and i+8 first, then halves again: the same order in every instruction set.
inline float reduce_add(F32x16 a) {
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
inline float reduce_max(F32x16 a) { return _mm512_reduce_max_ps(a.v); }

inline I32x16 to_int(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline I32x16 load_i32(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void store_i32(void* p, I32x16 a) { _mm512_storeu_si512(p, a.v); }
// Byte `index` of each lane, sign extended.
inline I32x16 signed_byte(I32x16 a, int index) {
  const auto left = static_cast<unsigned>(24 - 8 * index);
  return {_mm512_srai_epi32(_mm512_slli_epi32(a.v, left), 24)};
}
// The low or high nibble of byte `index` of each lane.
inline I32x16 nibble(I32x16 a, int index, bool high) {
  const auto right = static_cast<unsigned>(8 * index + (high ? 4 : 0));
  return {_mm512_and_si512(_mm512_srli_epi32(a.v, right), _mm512_set1_epi32(15))};
}
// Byte `index` of each lane.
inline I32x16 unsigned_byte(I32x16 a, int index) {
  const auto right = static_cast<unsigned>(8 * index);
  return {_mm512_and_si512(_mm512_srli_epi32(a.v, right), _mm512_set1_epi32(255))};
}
inline I32x16 set1_i32(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I32x16 add(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32x16 sub(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
// A quarter of each, rounded down.
inline I32x16 quarter(I32x16 a) { return {_mm512_srai_epi32(a.v, 2)}; }
inline F32x16 to_float(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline std::int32_t reduce_add(I32x16 a) { return _mm512_reduce_add_epi32(a.v); }
// Values in [-128, 127], or saturated.
inline void store_i8(std::int8_t* p, I32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}

// Values within 16 bits.
inline void store_i16(ShortPair* p, I32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
// Values within 16 bits, beside each other.
inline I16x32 pairs(I32x16 first, I32x16 second) {
  return {_mm512_mask_blend_epi16(0xAAAAAAAAU, first.v, _mm512_slli_epi32(second.v, 16))};
}
// 32 bytes, and 32 that are q + 128.
inline I16x32 widen(const std::int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline I16x32 widen_codes(const std::uint8_t* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_sub_epi16(_mm512_cvtepu8_epi16(x), _mm512_set1_epi16(128))};
}
inline I16x32 set1(ShortPair x) { return {_mm512_set1_epi32(std::bit_cast<std::int32_t>(x))}; }
inline I16x32 load16(const ShortPair* p) { return {_mm512_loadu_si512(p)}; }
inline void store16(ShortPair* p, I16x32 a) { _mm512_storeu_si512(p, a.v); }
inline I16x32 add(I16x32 a, I16x32 b) { return {_mm512_add_epi16(a.v, b.v)}; }
inline I16x32 sub(I16x32 a, I16x32 b) { return {_mm512_sub_epi16(a.v, b.v)}; }
// The pairs of a and b that stand first, or second, in each two of them.
inline I16x32 first_pairs(I16x32 a, I16x32 b) {
  const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_epi32(a.v, at, b.v)};
}
inline I16x32 second_pairs(I16x32 a, I16x32 b) {
  const __m512i at = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_permutex2var_epi32(a.v, at, b.v)};
}
// Each pair's products, with c.
inline I32x16 fma(I16x32 a, I16x32 b, I32x16 c) { return {_mm512_dpwssd_epi32(c.v, a.v, b.v)}; }

// Into the second-level cache.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

inline __m512i broadcast4(const std::int8_t* p) {
  std::int32_t x;
  std::memcpy(&x, p, sizeof x);
  return _mm512_set1_epi32(x);
}

// out[r][t][row] = sum over 32 features of w[row][k] * a[t][k] for one q4 block of each of R tiles.
template <int T, int R>
inline void dot_q4(const std::uint8_t* w, std::ptrdiff_t tile_stride, const std::int8_t* a,
                   std::ptrdiff_t stride, I32x16 (&out)[R][T]) {
  const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) out[r][t].v = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512i first[R], second[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i both = _mm512_loadu_si512(w + r * tile_stride + 64 * j);
      first[r] = _mm512_and_si512(both, mask);
      second[r] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const __m512i x = broadcast4(a + t * stride + 8 * j);
      const __m512i y = broadcast4(a + t * stride + 8 * j + 4);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) out[r][t].v = _mm512_dpbusd_epi32(out[r][t].v, first[r], x);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) out[r][t].v = _mm512_dpbusd_epi32(out[r][t].v, second[r], y);
    }
  }
}

// The same for q8 blocks. The instruction wants one factor unsigned: a + 128, and 128 times the
// sum of the weights is taken off again.
template <int T, int R>
inline void dot_q8(const std::int8_t* w, std::ptrdiff_t tile_stride, const std::int8_t* a,
                   std::ptrdiff_t stride, I32x16 (&out)[R][T]) {
  const __m512i offset = _mm512_set1_epi8(-128);
  __m512i surplus[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    surplus[r] = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) out[r][t].v = _mm512_setzero_si512();
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    __m512i weights[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      weights[r] = _mm512_loadu_si512(w + r * tile_stride + 64 * j);
      surplus[r] = _mm512_dpbusd_epi32(surplus[r], offset, weights[r]);
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const __m512i x = _mm512_xor_si512(broadcast4(a + t * stride + 4 * j), offset);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) out[r][t].v = _mm512_dpbusd_epi32(out[r][t].v, x, weights[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) out[r][t].v = _mm512_sub_epi32(out[r][t].v, surplus[r]);
}

// add_byte_dot sums in 32 bits, which no quads overflow.
inline constexpr int kQuadsPerSum = 0;

// What add_byte_dot's sums must begin with, for each unit of the sum of the activations, negated.
inline constexpr int kByteDotOffset = 128;

// acc[r][t][row] += sum over 32 features of (q[row][k] + 128) * a[t][k] for one block of each of R
// tiles, whose bytes are q + 128: what the instruction wants.
template <int Quads, int T, int R>
inline void add_byte_dot(const std::uint8_t* w, std::ptrdiff_t tile_stride, const std::int8_t* a,
                         std::ptrdiff_t stride, I32x16 (&acc)[R][T]) {
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    __m512i weights[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) weights[r] = _mm512_loadu_si512(w + r * tile_stride + 64 * j);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const __m512i x = broadcast4(a + t * stride + 4 * j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][t].v = _mm512_dpbusd_epi32(acc[r][t].v, weights[r], x);
    }
  }
}

}  // namespace fuserve::FUSERVE_ISA
