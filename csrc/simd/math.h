// Elementary functions over sixteen lanes, written once over the primitives.
#pragma once

namespace fuserve::FUSERVE_ISA {

// exp(x) to about 2 ulp; exactly 1 at 0, exactly 0 below -87.3, NaN for NaN. Attention relies on
// the first two: a fully masked block then changes nothing, bit for bit.
inline F32x16 exp(F32x16 x) {
  const F32x16 lowest = set1(-87.33654F);
  // max and min return their second operand when one is NaN.
  const F32x16 bounded = min(set1(88.0F), max(lowest, x));
  const F32x16 n = round(mul(bounded, set1(1.44269504F)));
  F32x16 r = fma(n, set1(-0.693359375F), bounded);
  r = fma(n, set1(2.12194440e-4F), r);
  F32x16 p = set1(1.9875691500e-4F);
  p = fma(p, r, set1(1.3981999507e-3F));
  p = fma(p, r, set1(8.3334519073e-3F));
  p = fma(p, r, set1(4.1665795894e-2F));
  p = fma(p, r, set1(1.6666665459e-1F));
  p = fma(p, r, set1(5.0000001201e-1F));
  p = add(fma(mul(p, r), r, r), set1(1.0F));
  return zero_where_below(mul(p, pow2(n)), x, lowest);
}

// 2^x for x below 127: about 1e-38 from -126 on, NaN for NaN (of no payload). By a polynomial of
// degree 5 to about 2 ulp and exactly 1 at 0, of degree 3 within 7.5e-5 of it.
template <int Degree>
inline F32x16 exp2(F32x16 x) {
  static_assert(Degree == 3 || Degree == 5);
  constexpr float c3[] = {0.99992806F, 0.69326097F, 0.24261113F, 0.055171665F};
  constexpr float c5[] = {1.0F, 0.6931470F, 0.24022242F, 0.055507336F, 0.009671513F, 0.0013264727F};
  const float* c = Degree == 3 ? c3 : c5;
  const F32x16 bounded = max(set1(-126.0F), x), magic = set1(0x1.8p23F);
  const F32x16 n = add(bounded, magic), r = sub(bounded, sub(n, magic));
  F32x16 p = set1(c[Degree]);
#pragma GCC unroll 5
  for (int i = Degree - 1; i >= 0; --i) p = fma(p, r, set1(c[i]));
  return times_pow2(p, n);
}

// Nearest integers in [-127, 127]. Infinities go to an end, NaN to 127: whoever quantizes them
// makes the scale NaN, but the integers are still added up.
inline I32x16 to_int8_range(F32x16 x) { return to_int(max(set1(-127.0F), min(x, set1(127.0F)))); }

inline F32x16 sigmoid(F32x16 x) { return div(set1(1.0F), add(set1(1.0F), exp(sub(zero(), x)))); }
inline F32x16 silu(F32x16 x) { return mul(x, sigmoid(x)); }

// tanh(x) = 1 - 2 / (exp(2x) + 1), absolute error below 2e-7.
inline F32x16 tanh(F32x16 x) {
  return sub(set1(1.0F), div(set1(2.0F), add(exp(add(x, x)), set1(1.0F))));
}

// erf(x) by Abramowitz and Stegun 7.1.26, absolute error below 2e-7.
inline F32x16 erf(F32x16 x) {
  const F32x16 a = abs(x);
  const F32x16 t = div(set1(1.0F), fma(set1(0.3275911F), a, set1(1.0F)));
  F32x16 p = set1(1.061405429F);
  p = fma(p, t, set1(-1.453152027F));
  p = fma(p, t, set1(1.421413741F));
  p = fma(p, t, set1(-0.284496736F));
  p = fma(p, t, set1(0.254829592F));
  const F32x16 tail = mul(mul(p, t), exp(sub(zero(), mul(a, a))));
  return copysign(sub(set1(1.0F), tail), x);
}

// x times the normal distribution's cumulative function, by erf.
inline F32x16 gelu(F32x16 x) {
  return mul(mul(x, set1(0.5F)), add(set1(1.0F), erf(mul(x, set1(0.70710678F)))));
}

}  // namespace fuserve::FUSERVE_ISA
