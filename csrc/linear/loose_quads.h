// Int8 rows whose products fit 16-bit sums. Where an instruction set multiplies bytes into 16 bits
// (kQuadsPerSum), a few large values beside each other would overflow them. Such quads of features
// are taken out of the row and multiplied on their own, so that the sum of all is exact.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "linear/format.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// Four neighbouring features, from `first`.
struct LooseQuad {
  std::int32_t first;
  std::int8_t values[4];
};

struct LooseQuads {
  int count;
  int quads_per_sum;  // for the rest of the row
};

// The most that a row of `cols` features can have: each quad in halves.
constexpr int most_loose_quads(int cols) { return round_up(cols, kBlockCols) / 2; }

// The largest sum of values of one sign that meet in one sum.
inline int largest_pair(const std::int8_t* quad) {
  int largest = 0;
  for (int i = 0; i < 4; i += 2)
    for (const int sign : {1, -1})
      largest = std::max(largest, std::max(sign * quad[i], 0) + std::max(sign * quad[i + 1], 0));
  return largest;
}

// Moves a quad from its row to the list; in halves, if it overflows even alone.
inline int take_out(std::int8_t* quad, int first, LooseQuad* list) {
  constexpr int kMostOfOneSign = 128;
  LooseQuad whole{first, {}};
  std::copy_n(quad, 4, whole.values);
  std::fill_n(quad, 4, std::int8_t{0});
  list[0] = whole;
  if (largest_pair(whole.values) <= kMostOfOneSign) return 1;
  list[1] = whole;
  for (int i = 0; i < 4; ++i) {
    list[0].values[i] = static_cast<std::int8_t>(whole.values[i] / 2);
    list[1].values[i] = static_cast<std::int8_t>(whole.values[i] - whole.values[i] / 2);
  }
  return 2;
}

template <int Quads>
int take_out_overflowing(std::int8_t* row, int cols, LooseQuad* list) {
  int count = 0;
  for (int block = 0; block < cols; block += kBlockCols)
    for (std::uint32_t eights; (eights = overflowing_eights<Quads>(row + block)) != 0;)
      for (; eights != 0; eights &= eights - 1) {
        std::int8_t* quad = row + block + 8 * std::countr_zero(eights);
        if (largest_pair(quad) < largest_pair(quad + 4)) quad += 4;
        count += take_out(quad, static_cast<int>(quad - row), list + count);
      }
  return count;
}

// Takes quads out of a row until its sums cannot overflow. Sums of two quads are a quarter faster
// than those of one, but a row of values that are all about as large would lose too many for it.
template <int Quads = kQuadsPerSum>
LooseQuads take_out_quads(std::int8_t* row, int cols, LooseQuad* list) {
  if constexpr (Quads == 2) {
    int overflowing = 0;
    for (int block = 0; block < cols; block += kBlockCols)
      overflowing += std::popcount(overflowing_eights<Quads>(row + block));
    if (overflowing > cols / 64) return {take_out_overflowing<1>(row, cols, list), 1};
    return {overflowing == 0 ? 0 : take_out_overflowing<Quads>(row, cols, list), Quads};
  }
  return {0, Quads};
}

// acc += a loose quad's products. weights: those of 16 rows for its features.
// A template, as instruction sets without such quads do not know the product.
template <class Sums>
inline void add_loose_quad(const std::uint8_t* weights, const std::int8_t* values, Sums& acc) {
  add_byte_quad(weights, values, acc);
}

}  // namespace fuserve::FUSERVE_ISA
