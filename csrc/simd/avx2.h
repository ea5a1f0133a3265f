// AVX2, FMA and F16C: sixteen lanes are two registers.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd/sse2.h"
#include "simd/types.h"

namespace fuserve::FUSERVE_ISA {

// Tokens and tiles of the micro-kernels: as many as sixteen registers hold sums for.
inline constexpr int kFloatTokens = 6;
inline constexpr int kIntegerTokens = 4;
inline constexpr int kTilesAtOnce = 1;
inline constexpr int kByteDotTokens = 4;

struct F32x16 {
  __m256 lo, hi;
};
struct I32x16 {
  __m256i lo, hi;
};
struct I16x32 {
  __m256i lo, hi;
};

inline F32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32x16 load16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F32x16 load16(const Half* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline F32x16 load16(const BFloat* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  const auto widen = [](__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  };
  return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
}
inline F32x16 load16(const std::int8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
}
inline void store16(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store16(Half* p, F32x16 a) {
  auto* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
// All ones in the lanes below n.
inline __m256i lanes_below(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F32x16 load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, lanes_below(n)),
          n > 8 ? _mm256_maskload_ps(p + 8, lanes_below(n - 8)) : _mm256_setzero_ps()};
}
inline void store_n(float* p, F32x16 a, int n) {
  _mm256_maskstore_ps(p, lanes_below(n), a.lo);
  if (n > 8) _mm256_maskstore_ps(p + 8, lanes_below(n - 8), a.hi);
}

inline F32x16 add(F32x16 a, F32x16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F32x16 sub(F32x16 a, F32x16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F32x16 mul(F32x16 a, F32x16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F32x16 div(F32x16 a, F32x16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32x16 max(F32x16 a, F32x16 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
inline F32x16 abs(F32x16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0F);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F32x16 sqrt(F32x16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline F32x16 round(F32x16 a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
// 2^n for integral n in [-126, 127], and 0 for -127.
inline F32x16 pow2(F32x16 n) {
  const auto one = [](__m256 x) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127)), 23));
  };
  return {one(n.lo), one(n.hi)};
}
// Values of [0.5, 2) times 2^n, of n + 1.5 * 2^23.
inline F32x16 times_pow2(F32x16 a, F32x16 n) {
  const auto one = [](__m256 x, __m256 power) {
    const __m256i exponents = _mm256_slli_epi32(_mm256_castps_si256(power), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponents));
  };
  return {one(a.lo, n.lo), one(a.hi, n.hi)};
}
// Lanes in [first, last) of a, the others `fill`.
inline F32x16 keep(F32x16 a, int first, int last, float fill) {
  const __m256 f = _mm256_set1_ps(fill);
  const auto one = [&](__m256 x, int from, int to) {
    const __m256i m = _mm256_andnot_si256(lanes_below(from), lanes_below(to));
    return _mm256_blendv_ps(f, x, _mm256_castsi256_ps(m));
  };
  return {one(a.lo, first, last), one(a.hi, first - 8, last - 8)};
}
// a, or 0 where x < limit.
inline F32x16 zero_where_below(F32x16 a, F32x16 x, F32x16 limit) {
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.lo, limit.lo, _CMP_LT_OQ), a.lo),
          _mm256_andnot_ps(_mm256_cmp_ps(x.hi, limit.hi, _CMP_LT_OQ), a.hi)};
}
// A bit for each lane where x > limit.
inline std::uint32_t lanes_above(F32x16 x, F32x16 limit) {
  const auto lo = _mm256_movemask_ps(_mm256_cmp_ps(x.lo, limit.lo, _CMP_GT_OQ));
  const auto hi = _mm256_movemask_ps(_mm256_cmp_ps(x.hi, limit.hi, _CMP_GT_OQ));
  return static_cast<std::uint32_t>(lo | hi << 8);
}
inline F32x16 copysign(F32x16 magnitude, F32x16 sign) {
  const __m256 bit = _mm256_set1_ps(-0.0F);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.lo), _mm256_and_ps(bit, sign.lo)),
          _mm256_or_ps(_mm256_andnot_ps(bit, magnitude.hi), _mm256_and_ps(bit, sign.hi))};
}

inline float first_lane(F32x16 a) { return _mm256_cvtss_f32(a.lo); }
// Sums lanes i and i+8 first, then halves again: the same order in every instruction set.
inline float reduce_add(F32x16 a) {
  const __m256 s8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
inline float reduce_max(F32x16 a) {
  const __m256 s8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_movehdup_ps(s2)));
}

inline I32x16 to_int(F32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline I32x16 load_i32(const void* p) {
  const auto* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store_i32(void* p, I32x16 a) {
  auto* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, a.lo);
  _mm256_storeu_si256(q + 1, a.hi);
}
// Byte `index` of each lane, sign extended.
inline I32x16 signed_byte(I32x16 a, int index) {
  const auto one = [left = 24 - 8 * index](__m256i x) {
    return _mm256_srai_epi32(_mm256_slli_epi32(x, left), 24);
  };
  return {one(a.lo), one(a.hi)};
}
// The low or high nibble of byte `index` of each lane.
inline I32x16 nibble(I32x16 a, int index, bool high) {
  const auto one = [right = 8 * index + (high ? 4 : 0)](__m256i x) {
    return _mm256_and_si256(_mm256_srli_epi32(x, right), _mm256_set1_epi32(15));
  };
  return {one(a.lo), one(a.hi)};
}
// Byte `index` of each lane.
inline I32x16 unsigned_byte(I32x16 a, int index) {
  const auto one = [right = 8 * index](__m256i x) {
    return _mm256_and_si256(_mm256_srli_epi32(x, right), _mm256_set1_epi32(255));
  };
  return {one(a.lo), one(a.hi)};
}
inline I32x16 set1_i32(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I32x16 add(I32x16 a, I32x16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline I32x16 sub(I32x16 a, I32x16 b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
// A quarter of each, rounded down.
inline I32x16 quarter(I32x16 a) { return {_mm256_srai_epi32(a.lo, 2), _mm256_srai_epi32(a.hi, 2)}; }
inline F32x16 to_float(I32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline std::int32_t reduce_add(I32x16 a) {
  const __m256i s8 = _mm256_add_epi32(a.lo, a.hi);
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 1)));
}
// Values in [-128, 127], or saturated.
inline void store_i8(std::int8_t* p, I32x16 a) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xD8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

// Values within 16 bits.
inline void store_i16(ShortPair* p, I32x16 a) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xD8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
}
// Values within 16 bits, beside each other.
inline I16x32 pairs(I32x16 first, I32x16 second) {
  const auto one = [](__m256i a, __m256i b) {
    return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xAA);
  };
  return {one(first.lo, second.lo), one(first.hi, second.hi)};
}
// 32 bytes, and 32 that are q + 128.
inline I16x32 widen(const std::int8_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(q)), _mm256_cvtepi8_epi16(_mm_loadu_si128(q + 1))};
}
inline I16x32 widen_codes(const std::uint8_t* p) {
  const auto one = [](const std::uint8_t* q) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
    return _mm256_sub_epi16(_mm256_cvtepu8_epi16(x), _mm256_set1_epi16(128));
  };
  return {one(p), one(p + 16)};
}
inline I16x32 set1(ShortPair x) {
  const __m256i both = _mm256_set1_epi32(std::bit_cast<std::int32_t>(x));
  return {both, both};
}
inline I16x32 load16(const ShortPair* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store16(ShortPair* p, I16x32 a) {
  auto* q = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(q, a.lo);
  _mm256_storeu_si256(q + 1, a.hi);
}
inline I16x32 add(I16x32 a, I16x32 b) {
  return {_mm256_add_epi16(a.lo, b.lo), _mm256_add_epi16(a.hi, b.hi)};
}
inline I16x32 sub(I16x32 a, I16x32 b) {
  return {_mm256_sub_epi16(a.lo, b.lo), _mm256_sub_epi16(a.hi, b.hi)};
}
// The pairs of a and b that stand first, or second, in each two of them.
inline I16x32 first_pairs(I16x32 a, I16x32 b) {
  const auto one = [](__m256i x, __m256i y) {
    const __m256 firsts = _mm256_shuffle_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(y), 0x88);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(firsts), 0xD8);
  };
  return {one(a.lo, a.hi), one(b.lo, b.hi)};
}
inline I16x32 second_pairs(I16x32 a, I16x32 b) {
  const auto one = [](__m256i x, __m256i y) {
    const __m256 seconds = _mm256_shuffle_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(y), 0xDD);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(seconds), 0xD8);
  };
  return {one(a.lo, a.hi), one(b.lo, b.hi)};
}
// Each pair's products, with c.
inline I32x16 fma(I16x32 a, I16x32 b, I32x16 c) {
  return {_mm256_add_epi32(_mm256_madd_epi16(a.lo, b.lo), c.lo),
          _mm256_add_epi32(_mm256_madd_epi16(a.hi, b.hi), c.hi)};
}

// Into the second-level cache.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

inline __m256i load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline __m256i broadcast4(const std::int8_t* p) {
  std::int32_t x;
  std::memcpy(&x, p, sizeof x);
  return _mm256_set1_epi32(x);
}

// out[r][t][row] = sum over 32 features of w[row][k] * a[t][k] for one q4 block of each of R tiles.
// Eight products of 15 * 128 * 2 fit an int16, so a block is widened once, at its end.
template <int T, int R>
inline void dot_q4(const std::uint8_t* w, std::ptrdiff_t tile_stride, const std::int8_t* a,
                   std::ptrdiff_t stride, I32x16 (&out)[R][T]) {
  const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int r = 0; r < R; ++r) {
    __m256i lo[T], hi[T];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const std::uint8_t* step = w + r * tile_stride + 64 * j;
      const __m256i w_lo = load_bytes(step), w_hi = load_bytes(step + 32);
      const __m256i first_lo = _mm256_and_si256(w_lo, mask);
      const __m256i first_hi = _mm256_and_si256(w_hi, mask);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m256i x = broadcast4(a + t * stride + 8 * j);
        const __m256i p_lo = _mm256_maddubs_epi16(first_lo, x);
        const __m256i p_hi = _mm256_maddubs_epi16(first_hi, x);
        lo[t] = j == 0 ? p_lo : _mm256_add_epi16(lo[t], p_lo);
        hi[t] = j == 0 ? p_hi : _mm256_add_epi16(hi[t], p_hi);
      }
      const __m256i second_lo = _mm256_and_si256(_mm256_srli_epi16(w_lo, 4), mask);
      const __m256i second_hi = _mm256_and_si256(_mm256_srli_epi16(w_hi, 4), mask);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m256i x = broadcast4(a + t * stride + 8 * j + 4);
        lo[t] = _mm256_add_epi16(lo[t], _mm256_maddubs_epi16(second_lo, x));
        hi[t] = _mm256_add_epi16(hi[t], _mm256_maddubs_epi16(second_hi, x));
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      out[r][t] = {_mm256_madd_epi16(lo[t], ones), _mm256_madd_epi16(hi[t], ones)};
  }
}

// acc[t][row] += sum over 4 features of w[row][k] * a[t][k]. |w| times sign(w) * a keeps the first
// factor unsigned; one pair of products fills an int16, so each is widened at once.
template <int T>
inline void add_signed_bytes(__m256i w_lo, __m256i w_hi, const std::int8_t* a,
                             std::ptrdiff_t stride, I32x16 (&acc)[T]) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i abs_lo = _mm256_sign_epi8(w_lo, w_lo), abs_hi = _mm256_sign_epi8(w_hi, w_hi);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const __m256i x = broadcast4(a + t * stride);
    const __m256i p_lo = _mm256_maddubs_epi16(abs_lo, _mm256_sign_epi8(x, w_lo));
    const __m256i p_hi = _mm256_maddubs_epi16(abs_hi, _mm256_sign_epi8(x, w_hi));
    acc[t].lo = _mm256_add_epi32(acc[t].lo, _mm256_madd_epi16(p_lo, ones));
    acc[t].hi = _mm256_add_epi32(acc[t].hi, _mm256_madd_epi16(p_hi, ones));
  }
}

// The same as dot_q4 for q8 blocks.
template <int T, int R>
inline void dot_q8(const std::int8_t* w, std::ptrdiff_t tile_stride, const std::int8_t* a,
                   std::ptrdiff_t stride, I32x16 (&out)[R][T]) {
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) out[r][t] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const std::int8_t* step = w + r * tile_stride + 64 * j;
      add_signed_bytes(load_bytes(step), load_bytes(step + 32), a + 4 * j, stride, out[r]);
    }
  }
}

// Quads (four neighbouring features) that add_byte_dot sums in 16 bits before it widens them.
inline constexpr int kQuadsPerSum = 2;

// A bit for each eight of 32 values: whether sums of one or two quads of it, times bytes up to 255,
// can leave 16 bits. A sum takes features 0 and 1, or 2 and 3, of its quads. Products of one sign
// are at most 128 * 255 = 32640 if their values sum to at most 128, and those of both lie between.
template <int Quads>
inline std::uint32_t overflowing_eights(const std::int8_t* a) {
  const __m256i x = load_bytes(a), zeros = _mm256_setzero_si256();
  const auto exceeds = [](__m256i magnitudes) {
    __m256i sums = _mm256_maddubs_epi16(magnitudes, _mm256_set1_epi8(1));
    if constexpr (Quads == 2) sums = _mm256_add_epi16(sums, _mm256_shuffle_epi32(sums, 0xB1));
    return _mm256_cmpgt_epi16(sums, _mm256_set1_epi16(128));
  };
  const __m256i positive = _mm256_max_epi8(x, zeros);
  const __m256i negative = _mm256_max_epi8(_mm256_sub_epi8(zeros, x), zeros);
  const __m256i any = _mm256_or_si256(exceeds(positive), exceeds(negative));
  const __m256i none = _mm256_cmpeq_epi64(any, zeros);
  return ~static_cast<std::uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(none))) & 15U;
}

// What add_byte_dot's sums must begin with, for each unit of the sum of the activations, negated.
inline constexpr int kByteDotOffset = 128;

// acc[row] += sum over a quad of (q + 128)[row][k] * a[k], which does not overflow.
inline void add_byte_quad(const std::uint8_t* w, const std::int8_t* a, I32x16& acc) {
  const __m256i ones = _mm256_set1_epi16(1), x = broadcast4(a);
  const __m256i lo = _mm256_maddubs_epi16(load_bytes(w), x);
  const __m256i hi = _mm256_maddubs_epi16(load_bytes(w + 32), x);
  acc.lo = _mm256_add_epi32(acc.lo, _mm256_madd_epi16(lo, ones));
  acc.hi = _mm256_add_epi32(acc.hi, _mm256_madd_epi16(hi, ones));
}

// acc[r][t][row] += sum over 32 features of (q + 128)[row][k] * a[t][k] for one block of each of R
// tiles, whose bytes are q + 128. Sums of so many quads of the a's do not overflow.
template <int Quads, int T, int R>
inline void add_byte_dot(const std::uint8_t* w, std::ptrdiff_t tile_stride, const std::int8_t* a,
                         std::ptrdiff_t stride, I32x16 (&acc)[R][T]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int quad = 0; quad < 8; quad += Quads) {
      const std::uint8_t* step = w + r * tile_stride + 64 * quad;
      __m256i w_lo[Quads], w_hi[Quads];
#pragma GCC unroll 2
      for (int i = 0; i < Quads; ++i) {
        w_lo[i] = load_bytes(step + 64 * i);
        w_hi[i] = load_bytes(step + 64 * i + 32);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        __m256i x = broadcast4(a + t * stride + 4 * quad);
        __m256i lo = _mm256_maddubs_epi16(w_lo[0], x), hi = _mm256_maddubs_epi16(w_hi[0], x);
        if constexpr (Quads == 2) {
          x = broadcast4(a + t * stride + 4 * quad + 4);
          lo = _mm256_add_epi16(lo, _mm256_maddubs_epi16(w_lo[1], x));
          hi = _mm256_add_epi16(hi, _mm256_maddubs_epi16(w_hi[1], x));
        }
        acc[r][t].lo = _mm256_add_epi32(acc[r][t].lo, _mm256_madd_epi16(lo, ones));
        acc[r][t].hi = _mm256_add_epi32(acc[r][t].hi, _mm256_madd_epi16(hi, ones));
      }
    }
}

}  // namespace fuserve::FUSERVE_ISA
