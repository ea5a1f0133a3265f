// The part of an image that a unit sees, normalized, padded and in blocks of channels.
#pragma once

#include <algorithm>

#include "conv/conv_types.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// Rows and columns of an image; beyond its edges lies padding.
struct Window {
  int first_row, first_col;
  int rows, cols;

  size_t pixels() const { return static_cast<size_t>(rows * cols); }
};

inline F32x16 load_up_to_16(const float* p, int n) { return n >= 16 ? load16(p) : load_n(p, n); }

// What becomes of a source's channels before the product.
struct Normalization {
  const float* scale;  // of these channels, with shift; null: none
  const float* shift;
  bool silu;

  Normalization(const ConvInput& input, const ChannelBlock& block)
      : scale(input.scale == nullptr ? nullptr : input.scale + block.channel),
        shift(input.scale == nullptr ? nullptr : input.shift + block.channel),
        silu(input.silu) {}

  // Of n channels from c of a pixel; the others may be anything.
  F32x16 apply(const float* x, int c, int n) const {
    F32x16 v = load_up_to_16(x + c, n);
    if (scale != nullptr) v = fma(v, load_up_to_16(scale + c, n), load_up_to_16(shift + c, n));
    return silu ? mul(v, sigmoid(v)) : v;
  }
};

// `count` channels of a pixel.
inline void pack_pixel(const float* x, int count, const Normalization& norm, float* out) {
  for (int c = 0; c < count; c += 16) {
    const int n = std::min(16, count - c);
    const F32x16 v = norm.apply(x, c, n);
    if (n == 16)
      store16(out + c, v);
    else
      store_n(out + c, v, n);
  }
}

// out: [rows, cols, block.count]
inline void pack_window(const ConvShape& shape, const ConvInput& input, const ChannelBlock& block,
                        const Window& window, float* out) {
  const int channels = shape.channels[static_cast<size_t>(block.source)];
  const float* source = input.sources[static_cast<size_t>(block.source)] + block.first;
  const Normalization norm(input, block);
  const int first = std::clamp(-window.first_col, 0, window.cols);
  const int last = std::clamp(input.width - window.first_col, first, window.cols);
  for (int row = 0; row < window.rows; ++row) {
    const int y = window.first_row + row;
    const bool inside = y >= -input.above && y < input.height + input.below;
    const int from = inside ? first : window.cols, to = inside ? last : window.cols;
    out = std::fill_n(out, from * block.count, 0.0F);
    for (int col = from; col < to; ++col, out += block.count) {
      const std::ptrdiff_t pixel =
          static_cast<std::ptrdiff_t>(y) * input.width + window.first_col + col;
      pack_pixel(source + pixel * channels, block.count, norm, out);
    }
    out = std::fill_n(out, (window.cols - to) * block.count, 0.0F);
  }
}

}  // namespace fuserve::FUSERVE_ISA
