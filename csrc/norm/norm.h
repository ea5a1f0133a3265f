// RMSNorm and LayerNorm of one row.
#pragma once

#include <cmath>

#include "norm/norm_types.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// Calls f(k, n) for each run of n <= 16 features from k.
template <class F>
inline void for_lanes(int size, F&& f) {
  int k = 0;
  for (; k + 16 <= size; k += 16) f(k, 16);
  if (k < size) f(k, size - k);
}

// out may be x.
inline void normalize(const Norm& norm, const float* x, int size, float* out) {
  const auto load = [](const float* p, int n) { return n == 16 ? load16(p) : load_n(p, n); };
  const float count = static_cast<float>(size);
  F32x16 total = zero();
  float mean = 0.0F;
  if (norm.kind == NormKind::layer) {
    for_lanes(size, [&](int k, int n) { total = add(total, load(x + k, n)); });
    mean = reduce_add(total) / count;
    total = zero();
    for_lanes(size, [&](int k, int n) {
      const F32x16 d = keep(sub(load(x + k, n), set1(mean)), 0, n, 0.0F);
      total = fma(d, d, total);
    });
  } else {
    for_lanes(size, [&](int k, int n) {
      const F32x16 v = load(x + k, n);
      total = fma(v, v, total);
    });
  }
  const float inverse = 1.0F / std::sqrt(reduce_add(total) / count + norm.eps);
  for_lanes(size, [&](int k, int n) {
    F32x16 v = mul(mul(sub(load(x + k, n), set1(mean)), set1(inverse)), load(norm.weight + k, n));
    if (norm.bias != nullptr) v = add(v, load(norm.bias + k, n));
    if (n == 16)
      store16(out + k, v);
    else
      store_n(out + k, v, n);
  });
}

}  // namespace fuserve::FUSERVE_ISA
