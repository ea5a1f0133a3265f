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

// `count` channels of a pixel.  scale, shift: of these channels, or null
inline void pack_pixel(const float* x, int count, const float* scale, const float* shift, bool silu,
                       float* out) {
  for (int c = 0; c < count; c += 16) {
    const int n = std::min(16, count - c);
    const auto load = [n](const float* p) { return n == 16 ? load16(p) : load_n(p, n); };
    F32x16 v = load(x + c);
    if (scale != nullptr) v = fma(v, load(scale + c), load(shift + c));
    if (silu) v = mul(v, sigmoid(v));
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
  const float* scale = input.scale == nullptr ? nullptr : input.scale + block.channel;
  const float* shift = input.scale == nullptr ? nullptr : input.shift + block.channel;
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
      pack_pixel(source + pixel * channels, block.count, scale, shift, input.silu, out);
    }
    out = std::fill_n(out, (window.cols - to) * block.count, 0.0F);
  }
}

}  // namespace fuserve::FUSERVE_ISA
