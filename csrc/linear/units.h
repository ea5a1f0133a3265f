// How a product is cut into units of work for a team's threads.
#pragma once

#include <algorithm>

#include "linear/linear.h"

namespace fuserve::FUSERVE_ISA {

// Rows of activations that one unit of work multiplies with its weights: few enough to stay in a
// core's second-level cache, whole (int8) or in the features of one panel (fp32).
inline int rows_per_unit(const PackedLinear& w, const Rows& x, int rows) {
  constexpr size_t kCacheBytes = 256 * 1024;
  constexpr int kStep = 24;  // whole passes in every instruction set
  const size_t row_bytes = w.wants_token_rows() ? x.tokens.layout.stride() : x.layout.stride();
  const bool is_int8 = w.wants_token_rows() || w.wants_quantized_input();
  const int most = is_int8 ? std::min(static_cast<int>(kCacheBytes / row_bytes), 120) : 240;
  const int units = ceil_div(rows, std::max(most / kStep * kStep, kStep));
  return round_up(ceil_div(rows, units), kStep);
}

// Tiles of one unit: enough work to be worth taking, few enough to divide well.
inline int tiles_per_unit(const PackedLinear& w, int num_threads) {
  return std::clamp(w.tiles() / (8 * num_threads), 1, 8);
}

}  // namespace fuserve::FUSERVE_ISA
