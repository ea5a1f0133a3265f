// The input and output transforms of F(2x2, 3x3) and F(4x4, 3x3), arXiv 1509.09308.
#pragma once

#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// B^T d, in place, of values `Step` apart.
template <int Outputs, int Step>
inline void transform_input_line(F32x16* d) {
  if constexpr (Outputs == 2) {
    const F32x16 d1 = d[Step], d2 = d[2 * Step];
    d[0] = sub(d[0], d2);
    d[Step] = add(d1, d2);
    d[2 * Step] = sub(d2, d1);
    d[3 * Step] = sub(d1, d[3 * Step]);
  } else {
    const F32x16 four = set1(4.0F), minus_four = set1(-4.0F), minus_five = set1(-5.0F);
    const F32x16 d1 = d[Step], d2 = d[2 * Step], d3 = d[3 * Step], d4 = d[4 * Step];
    d[0] = fma(four, d[0], fma(minus_five, d2, d4));
    d[5 * Step] = fma(four, d1, fma(minus_five, d3, d[5 * Step]));
    const F32x16 even1 = fma(minus_four, d2, d4), odd1 = fma(minus_four, d1, d3);
    d[Step] = add(even1, odd1);
    d[2 * Step] = sub(even1, odd1);
    const F32x16 even2 = sub(d4, d2), half = sub(d3, d1), odd2 = add(half, half);
    d[3 * Step] = add(even2, odd2);
    d[4 * Step] = sub(even2, odd2);
  }
}

// The first `Outputs` become A^T m.
template <int Outputs, int Step>
inline void transform_output_line(F32x16* m) {
  const F32x16 sum = add(m[Step], m[2 * Step]), difference = sub(m[Step], m[2 * Step]);
  if constexpr (Outputs == 2) {
    m[0] = add(m[0], sum);
    m[Step] = sub(difference, m[3 * Step]);
  } else {
    const F32x16 sum2 = add(m[3 * Step], m[4 * Step]);
    const F32x16 difference2 = sub(m[3 * Step], m[4 * Step]);
    m[0] = add(m[0], add(sum, sum2));
    m[Step] = fma(set1(2.0F), difference2, difference);
    m[2 * Step] = fma(set1(4.0F), sum2, sum);
    m[3 * Step] = add(fma(set1(8.0F), difference2, difference), m[5 * Step]);
  }
}

// B^T d B of [Outputs + 2][Outputs + 2]
template <int Outputs>
inline void transform_input(F32x16* d) {
  constexpr int kSide = Outputs + 2;
  for (int i = 0; i < kSide; ++i) transform_input_line<Outputs, 1>(d + i * kSide);
  for (int i = 0; i < kSide; ++i) transform_input_line<Outputs, kSide>(d + i);
}

// A^T m A, in the first rows and columns of [Outputs + 2][Outputs + 2]
template <int Outputs>
inline void transform_output(F32x16* m) {
  constexpr int kSide = Outputs + 2;
  for (int i = 0; i < kSide; ++i) transform_output_line<Outputs, 1>(m + i * kSide);
  for (int i = 0; i < Outputs; ++i) transform_output_line<Outputs, kSide>(m + i);
}

}  // namespace fuserve::FUSERVE_ISA
