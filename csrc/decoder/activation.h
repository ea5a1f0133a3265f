// Activation functions of the feed-forward half.
#pragma once

#include "decoder/decoder.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

inline F32x16 activate(Activation activation, F32x16 x) {
  switch (activation) {
    case Activation::silu:
      return silu(x);
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh: {
      const F32x16 cubed = mul(mul(x, x), x);
      const F32x16 inner = mul(set1(0.79788456F), fma(cubed, set1(0.044715F), x));
      return mul(mul(x, set1(0.5F)), add(set1(1.0F), tanh(inner)));
    }
    default:
      return max(zero(), x);
  }
}

}  // namespace fuserve::FUSERVE_ISA
