// Sums of products of floats, or of pairs of integers of 16 bits, which are exact.
#pragma once

#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

template <typename Value>
struct Products;
template <>
struct Products<float> {
  using Sum = float;
  using Sums = F32x16;
  static F32x16 none() { return zero(); }
  static F32x16 load(const float* p) { return load16(p); }
  static void store(float* p, F32x16 sums) { store16(p, sums); }
};
template <>
struct Products<ShortPair> {
  using Sum = std::int32_t;
  using Sums = I32x16;
  static I32x16 none() { return set1_i32(0); }
  static I32x16 load(const std::int32_t* p) { return load_i32(p); }
  static void store(std::int32_t* p, I32x16 sums) { store_i32(p, sums); }
};

}  // namespace fuserve::FUSERVE_ISA
