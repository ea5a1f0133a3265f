// The transforms of F(2x2, 3x3) and F(4x4, 3x3), arXiv 1509.09308, whose points are 0, 1, -1
// (, 2, -2) and infinity, told apart by the side of the squares that they multiply: 4 and 6.
//
// Side 3 is F(2x2) of an image that was enlarged twice to nearest. Two outputs see a, b, b and c of
// a line, so that one of F(2)'s four products is zero and another's halves cancel:
//   (a - b) g0 + b (g0 + g1 + g2)  and  b (g0 + g1 + g2) - (b - c) g2
#pragma once

#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

template <int Side>
inline constexpr int kSquareOutputs = Side == 6 ? 4 : 2;

// B^T d, in place, of values `Step` apart.
template <int Side, int Step, typename V>
inline void transform_input_line(V* d) {
  if constexpr (Side == 3) {
    d[0] = sub(d[0], d[Step]);
    d[2 * Step] = sub(d[Step], d[2 * Step]);
  } else if constexpr (Side == 4) {
    const V d1 = d[Step], d2 = d[2 * Step];
    d[0] = sub(d[0], d2);
    d[Step] = add(d1, d2);
    d[2 * Step] = sub(d2, d1);
    d[3 * Step] = sub(d1, d[3 * Step]);
  } else {
    const V four = set1(4.0F), minus_four = set1(-4.0F), minus_five = set1(-5.0F);
    const V d1 = d[Step], d2 = d[2 * Step], d3 = d[3 * Step], d4 = d[4 * Step];
    d[0] = fma(four, d[0], fma(minus_five, d2, d4));
    d[5 * Step] = fma(four, d1, fma(minus_five, d3, d[5 * Step]));
    const V even1 = fma(minus_four, d2, d4), odd1 = fma(minus_four, d1, d3);
    d[Step] = add(even1, odd1);
    d[2 * Step] = sub(even1, odd1);
    const V even2 = sub(d4, d2), half = sub(d3, d1), odd2 = add(half, half);
    d[3 * Step] = add(even2, odd2);
    d[4 * Step] = sub(even2, odd2);
  }
}

// The first kSquareOutputs become A^T m.
template <int Side, int Step, typename V>
inline void transform_output_line(V* m) {
  if constexpr (Side == 3) {
    const V both = m[Step];
    m[0] = add(m[0], both);
    m[Step] = sub(both, m[2 * Step]);
  } else {
    const V sum = add(m[Step], m[2 * Step]), difference = sub(m[Step], m[2 * Step]);
    if constexpr (Side == 4) {
      m[0] = add(m[0], sum);
      m[Step] = sub(difference, m[3 * Step]);
    } else {
      const V sum2 = add(m[3 * Step], m[4 * Step]), difference2 = sub(m[3 * Step], m[4 * Step]);
      m[0] = add(m[0], add(sum, sum2));
      m[Step] = fma(set1(2.0F), difference2, difference);
      m[2 * Step] = fma(set1(4.0F), sum2, sum);
      m[3 * Step] = add(fma(set1(8.0F), difference2, difference), m[5 * Step]);
    }
  }
}

// G g, of three values to Side, each `Step` apart.
template <int Side, int From, int Step>
inline void transform_filter_line(const F32x16* g, F32x16* out) {
  const F32x16 g0 = g[0], g1 = g[From], g2 = g[2 * From];
  if constexpr (Side == 3) {
    out[0] = g0;
    out[Step] = add(add(g0, g2), g1);
    out[2 * Step] = g2;
  } else if constexpr (Side == 4) {
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

// The same in integers; for squares of side 4 twice of it.
template <int Side, int From, int Step>
inline void transform_filter_line(const I16x32* g, I16x32* out) {
  const I16x32 g0 = g[0], g1 = g[From], g2 = g[2 * From], even = add(g0, g2);
  if constexpr (Side == 3) {
    out[0] = g0;
    out[Step] = add(even, g1);
    out[2 * Step] = g2;
  } else {
    static_assert(Side == 4);
    out[0] = add(g0, g0);
    out[Step] = add(even, g1);
    out[2 * Step] = sub(even, g1);
    out[3 * Step] = add(g2, g2);
  }
}

// G g G^T of [3][3], as [Side][Side]
template <int Side, typename V>
inline void transform_filter(const V* g, V* out) {
  V lines[Side * 3];
  for (int i = 0; i < 3; ++i) transform_filter_line<Side, 3, 3>(g + i, lines + i);
  for (int i = 0; i < Side; ++i) transform_filter_line<Side, 1, 1>(lines + i * 3, out + i * Side);
}

// B^T d B of [Side][Side]
template <int Side, typename V>
inline void transform_input(V* d) {
  for (int i = 0; i < Side; ++i) transform_input_line<Side, 1>(d + i * Side);
  for (int i = 0; i < Side; ++i) transform_input_line<Side, Side>(d + i);
}

// A^T m A, in the first kSquareOutputs rows and columns of [Side][Side]
template <int Side, typename V>
inline void transform_output(V* m) {
  for (int i = 0; i < Side; ++i) transform_output_line<Side, 1>(m + i * Side);
  for (int i = 0; i < kSquareOutputs<Side>; ++i) transform_output_line<Side, Side>(m + i);
}

}  // namespace fuserve::FUSERVE_ISA
