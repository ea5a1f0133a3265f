// Rows of activations as the linear kernels read them: fp32, int8 with a scale for each block of 32
// features, or int8 with a scale for each row (token_rows.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear/format.h"
#include "linear/token_rows.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// One quantized row is one record: int8 values, then a scale for each block, then offsets: -8 times
// the sums of scale * q over groups of 32, 64 and 128 features, which take out q4's zero point.
struct QuantizedLayout {
  int cols = 0;

  int blocks() const { return ceil_div(cols, kBlockCols); }
  size_t scales_offset() const { return static_cast<size_t>(blocks()) * kBlockCols; }
  // level 0, 1, 2: groups of 1, 2, 4 blocks.
  size_t offsets_offset(int level) const {
    size_t floats = static_cast<size_t>(blocks());
    for (int i = 0; i < level; ++i) floats += static_cast<size_t>(ceil_div(blocks(), 1 << i));
    return scales_offset() + 4 * floats;
  }
  // An odd number of cache lines, so that equal places of several rows do not share a cache set.
  size_t stride() const { return (offsets_offset(3) + 63) / 64 * 64 | 64; }
};

struct Rows {
  const float* values = nullptr;  // [rows, stride]
  std::ptrdiff_t value_stride = 0;
  const std::int8_t* quantized = nullptr;  // records of `layout`
  QuantizedLayout layout;
  TokenRows tokens;

  const float* value_row(int row) const { return values + row * value_stride; }
  const std::int8_t* record(int row) const {
    return quantized +
           static_cast<std::ptrdiff_t>(row) * static_cast<std::ptrdiff_t>(layout.stride());
  }
};

inline float* scales_of(std::int8_t* record, const QuantizedLayout& layout) {
  return reinterpret_cast<float*>(record + layout.scales_offset());
}
inline float* offsets_of(std::int8_t* record, const QuantizedLayout& layout, int level) {
  return reinterpret_cast<float*>(record + layout.offsets_offset(level));
}
inline const float* scales_of(const std::int8_t* record, const QuantizedLayout& layout) {
  return reinterpret_cast<const float*>(record + layout.scales_offset());
}
inline const float* offsets_of(const std::int8_t* record, const QuantizedLayout& layout,
                               int level) {
  return reinterpret_cast<const float*>(record + layout.offsets_offset(level));
}

// Quantizes the `count` (at most 128) features from `first`, a multiple of 128, of one row to
// [-127, 127]. A NaN or infinity makes its block's scale NaN, so that it reaches the output.
inline void quantize_features(const float* x, int first, int count, std::int8_t* record,
                              const QuantizedLayout& layout) {
  float sums[4] = {};
  const int first_block = first / kBlockCols;
  const int blocks = ceil_div(count, kBlockCols);
  for (int b = 0; b < blocks; ++b) {
    const int left = count - b * kBlockCols;
    const float* source = x + b * kBlockCols;
    const F32x16 lo = left >= 16 ? load16(source) : load_n(source, left);
    const F32x16 hi = left >= 32  ? load16(source + 16)
                      : left > 16 ? load_n(source + 16, left - 16)
                                  : zero();
    const float largest = reduce_max(max(abs(lo), abs(hi)));
    const float poison = reduce_add(mul(add(lo, hi), zero()));
    const float scale = largest * (1.0F / 127.0F) + poison;
    const float inverse = largest > 0.0F ? 127.0F / largest : 0.0F;
    const I32x16 q_lo = to_int8_range(mul(lo, set1(inverse)));
    const I32x16 q_hi = to_int8_range(mul(hi, set1(inverse)));
    std::int8_t* out = record + first + b * kBlockCols;
    store_i8(out, q_lo);
    store_i8(out + 16, q_hi);
    scales_of(record, layout)[first_block + b] = scale;
    sums[b] = -8.0F * (scale * static_cast<float>(reduce_add(q_lo) + reduce_add(q_hi)));
    offsets_of(record, layout, 0)[first_block + b] = sums[b];
  }
  float* pairs = offsets_of(record, layout, 1) + first_block / 2;
  pairs[0] = sums[0] + sums[1];
  if (blocks > 2) pairs[1] = sums[2] + sums[3];
  offsets_of(record, layout, 2)[first_block / 4] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

inline void quantize_row(const float* x, std::int8_t* record, const QuantizedLayout& layout) {
  for (int first = 0; first < layout.cols; first += 4 * kBlockCols) {
    const int left = layout.cols - first;
    quantize_features(x + first, first, left < 128 ? left : 128, record, layout);
  }
}

}  // namespace fuserve::FUSERVE_ISA
