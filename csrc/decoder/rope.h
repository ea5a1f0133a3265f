// Rotary position embedding (arXiv 2104.09864): angles once a step, rotations once a head.
#pragma once

#include <cmath>
#include <cstddef>

#include "decoder/decoder.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// cosines and sines of one position.  [dim / 2] each
inline void rope_angles(const Rope& rope, int position, float* cosines, float* sines) {
  const bool dynamic = rope.dynamic_factor > 0.0 && position >= rope.dynamic_from;
  double base = 0.0;
  if (dynamic) {
    const double stretch =
        rope.dynamic_factor * (position + 1) / rope.dynamic_from - (rope.dynamic_factor - 1.0);
    base = rope.dynamic_base * std::pow(stretch, rope.dim / (rope.dim - 2.0));
  }
  for (int i = 0; i < rope.dim / 2; ++i) {
    const float frequency = dynamic ? static_cast<float>(1.0 / std::pow(base, 2.0 * i / rope.dim))
                                    : rope.inverse_frequencies[static_cast<size_t>(i)];
    const float angle = static_cast<float>(position) * frequency;
    cosines[i] = std::cos(angle) * rope.attention_factor;
    sines[i] = std::sin(angle) * rope.attention_factor;
  }
}

// Rotates one head in place.
inline void rotate(const Rope& rope, const float* cosines, const float* sines, float* head) {
  const int half = rope.dim / 2;
  const int step = rope.interleaved ? 2 : 1, partner = rope.interleaved ? 1 : half;
  int i = 0;
  if (!rope.interleaved) {
    for (; i + 16 <= half; i += 16) {
      const F32x16 x = load16(head + i), y = load16(head + half + i);
      const F32x16 c = load16(cosines + i), s = load16(sines + i);
      store16(head + i, sub(mul(x, c), mul(y, s)));
      store16(head + half + i, add(mul(y, c), mul(x, s)));
    }
  }
  for (; i < half; ++i) {
    float* x = head + i * step;
    const float a = x[0], b = x[partner];
    x[0] = a * cosines[i] - b * sines[i];
    x[partner] = b * cosines[i] + a * sines[i];
  }
}

}  // namespace fuserve::FUSERVE_ISA
