// The transforms of F(2x2, 3x3) and F(4x4, 3x3), arXiv 1509.09308, whose points are 0, 1, -1
// (, 2, -2) and infinity.
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

// G g, of three values to Outputs + 2, each `Step` apart.
template <int Outputs, int From, int Step>
inline void transform_filter_line(const F32x16* g, F32x16* out) {
  const F32x16 g0 = g[0], g1 = g[From], g2 = g[2 * From];
  if constexpr (Outputs == 2) {
    const F32x16 half = set1(0.5F), even = mul(half, add(g0, g2));
    out[0] = g0;
    out[Step] = fma(half, g1, even);
    out[2 * Step] = fma(set1(-0.5F), g1, even);
    out[3 * Step] = g2;
  } else {
    const F32x16 even1 = mul(set1(-1.0F / 6), add(g0, g2));
    const F32x16 even2 = fma(set1(1.0F / 24), g0, mul(set1(1.0F / 6), g2));
    out[0] = mul(set1(0.25F), g0);
    out[Step] = fma(set1(-1.0F / 6), g1, even1);
    out[2 * Step] = fma(set1(1.0F / 6), g1, even1);
    out[3 * Step] = fma(set1(1.0F / 12), g1, even2);
    out[4 * Step] = fma(set1(-1.0F / 12), g1, even2);
    out[5 * Step] = g2;
  }
}

// G g G^T of [3][3], as [Outputs + 2][Outputs + 2]
template <int Outputs>
inline void transform_filter(const F32x16* g, F32x16* out) {
  constexpr int kSide = Outputs + 2;
  F32x16 lines[kSide * 3];
  for (int i = 0; i < 3; ++i) transform_filter_line<Outputs, 3, 3>(g + i, lines + i);
  for (int i = 0; i < kSide; ++i)
    transform_filter_line<Outputs, 1, 1>(lines + i * 3, out + i * kSide);
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
