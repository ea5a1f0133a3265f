// What AVX2 and AVX-512 do alike, in registers of 16 bytes.
#pragma once

#include <emmintrin.h>

#include <cstdint>

namespace fuserve::FUSERVE_ISA {

// The low and the high nibbles of 16 bytes, less `zero`.
inline void split_16_bytes(const void* p, int zero, std::int8_t* low, std::int8_t* high) {
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
  const __m128i mask = _mm_set1_epi8(15), offset = _mm_set1_epi8(static_cast<char>(zero));
  const __m128i lo = _mm_and_si128(bytes, mask);
  const __m128i hi = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm_sub_epi8(lo, offset));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm_sub_epi8(hi, offset));
}

}  // namespace fuserve::FUSERVE_ISA
