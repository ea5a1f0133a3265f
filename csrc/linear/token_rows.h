// Rows of activations in int8 with one scale for the whole row, and the outliers of LLM.int8().
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "linear/format.h"
#include "linear/loose_quads.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// A value that stays fp32.
struct Outlier {
  std::int32_t col;
  float value;
};

// What stands behind the int8 values of a row.
struct TokenHeader {
  float scale;
  std::int32_t sum;       // of the int8 values, with those of loose quads
  std::int32_t outliers;  // how many there are in the row's list
  LooseQuads loose;       // in the row's other list
};

struct TokenLayout {
  int cols = 0;

  size_t header_offset() const { return static_cast<size_t>(round_up(cols, kBlockCols)); }
  // An odd number of cache lines, so that equal places of several rows do not share a cache set.
  size_t stride() const { return (header_offset() + sizeof(TokenHeader) + 63) / 64 * 64 | 64; }
};

struct TokenRows {
  std::int8_t* records = nullptr;  // of `layout`
  Outlier* outliers = nullptr;     // [rows, cols], each row's by ascending column
  LooseQuad* quads = nullptr;      // [rows, most_loose_quads(cols)]
  TokenLayout layout;

  std::int8_t* record(int row) const {
    return records + row * static_cast<std::ptrdiff_t>(layout.stride());
  }
  TokenHeader& header(int row) const {
    return *reinterpret_cast<TokenHeader*>(record(row) + layout.header_offset());
  }
  Outlier* outliers_of(int row) const {
    return outliers + row * static_cast<std::ptrdiff_t>(layout.cols);
  }
  LooseQuad* loose_quads_of(int row) const {
    return quads + row * static_cast<std::ptrdiff_t>(most_loose_quads(layout.cols));
  }
};

// x <- (x - shift) * multiplier for `count` features from `first`; x is padded to sixteens.
inline void transform_features(const LinearInput& input, int first, int count, float* x) {
  for (int k = 0; k < count; k += 16) {
    const int n = count - k < 16 ? count - k : 16;
    F32x16 v = load16(x + k);
    if (input.shift != nullptr) v = sub(v, load_n(input.shift + first + k, n));
    if (input.multiplier != nullptr) v = mul(v, load_n(input.multiplier + first + k, n));
    store16(x + k, v);
  }
}

// The row's values beyond the threshold, by ascending column. Returns how many there are.
inline int list_outliers(const float* x, int cols, float threshold, Outlier* list) {
  int count = 0;
  for (int k = 0; k < cols; k += 16) {
    const int n = cols - k < 16 ? cols - k : 16;
    std::uint32_t lanes = lanes_above(abs(load_n(x + k, n)), set1(threshold));
    for (; lanes != 0; lanes &= lanes - 1) {
      const int col = k + std::countr_zero(lanes);
      list[count++] = {col, x[col]};
    }
  }
  return count;
}

// Beyond which magnitude values of the row stay fp32: `threshold`, in units of the row's root mean
// square where that is less than one. The paper's threshold of 6 means hidden states that a norm
// has left at a root mean square of about one; inputs of output and down projections are smaller,
// and their largest values would set a step that is too coarse for the others.
inline float outlier_limit(const float* x, int cols, float threshold) {
  F32x16 squares = zero();
  for (int k = 0; k < cols; k += 16) {
    const F32x16 v = cols - k < 16 ? load_n(x + k, cols - k) : load16(x + k);
    squares = fma(v, v, squares);
  }
  const float mean = reduce_add(squares) / static_cast<float>(cols);
  return mean < 1.0F ? threshold * std::sqrt(mean) : threshold;
}

// Quantizes a row to [-127, 127] as `input` wants it. A NaN makes the scale NaN, so that it reaches
// the output; so does an infinity, unless it is an outlier and reaches the output as what it is.
inline void quantize_token(const float* x, int row, const LinearInput& input,
                           const TokenRows& out) {
  const int cols = out.layout.cols;
  const bool separate = input.kind == InputKind::outliers;
  const float threshold = separate ? outlier_limit(x, cols, input.threshold) : 0.0F;
  const F32x16 limit = set1(threshold);
  const auto load = [&](int k) {
    const F32x16 v = cols - k < 16 ? load_n(x + k, cols - k) : load16(x + k);
    return separate ? zero_where_below(v, limit, abs(v)) : v;
  };
  F32x16 extreme = zero(), poison = zero();
  for (int k = 0; k < cols; k += 16) {
    const F32x16 v = load(k);
    extreme = max(extreme, abs(v));
    poison = add(poison, mul(v, zero()));
  }
  const float largest = reduce_max(extreme);
  const bool fixed = input.kind == InputKind::fixed;
  const float scale = fixed ? input.scale : largest * (1.0F / 127.0F);
  const float inverse = fixed ? 1.0F / scale : largest > 0.0F ? 127.0F / largest : 0.0F;
  std::int8_t* values = out.record(row);
  I32x16 sum = to_int(zero());
  for (int k = 0; k < static_cast<int>(out.layout.header_offset()); k += 16) {
    const I32x16 q = k < cols ? to_int8_range(mul(load(k), set1(inverse))) : to_int(zero());
    sum = add(sum, q);
    store_i8(values + k, q);
  }
  const int outliers = separate ? list_outliers(x, cols, threshold, out.outliers_of(row)) : 0;
  const LooseQuads loose = take_out_quads(values, cols, out.loose_quads_of(row));
  out.header(row) = {scale + reduce_add(poison), reduce_add(sum), outliers, loose};
}

}  // namespace fuserve::FUSERVE_ISA
