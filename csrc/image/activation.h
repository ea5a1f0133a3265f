// Activation functions of epilogues.
#pragma once

#include "image/program.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// geglu is not among them: it takes two values.
inline F32x16 activate(LinearActivation activation, F32x16 x) {
  switch (activation) {
    case LinearActivation::silu:
      return silu(x);
    case LinearActivation::gelu:
      return gelu(x);
    case LinearActivation::quick_gelu:
      return mul(x, sigmoid(mul(x, set1(1.702F))));
    case LinearActivation::relu:
      return max(zero(), x);
    default:
      return x;
  }
}

}  // namespace fuserve::FUSERVE_ISA
