// The part of an image that a unit sees in int8, normalized, padded and in blocks of channels.
#pragma once

#include <algorithm>

#include "conv/window.h"
#include "linear/loose_quads.h"

namespace fuserve::FUSERVE_ISA {

// What a pixel leaves behind besides its values, over all blocks.
struct PixelTotals {
  std::int32_t sum = 0;
  float poison = 0.0F;  // NaN after a NaN or infinity
};

// Quantizes a block's channels of pixels to [-127, 127].
class PixelQuantizer {
 public:
  PixelQuantizer(const PackedConv& w, const ConvInput& input, const ChannelBlock& block)
      : norm_(input, block),
        multiplier_(w.multiplier == nullptr ? nullptr : w.multiplier + block.channel),
        inverse_(set1(1.0F / w.input_scale)),
        count_(block.count) {}

  // out: [count, padded to 32]
  void quantize(const float* x, std::int8_t* out, PixelTotals& totals) const {
    I32x16 sum = set1_i32(0);
    F32x16 poison = zero();
    for (int c = 0; c < round_up(count_, kBlockCols); c += 16) {
      const int n = std::clamp(count_ - c, 0, 16);
      F32x16 v = zero();
      if (n > 0) v = norm_.apply(x, c, n);
      if (n > 0 && multiplier_ != nullptr) v = mul(v, load_up_to_16(multiplier_ + c, n));
      poison = add(poison, mul(v, zero()));
      const I32x16 q = to_int8_range(mul(v, inverse_));
      sum = add(sum, q);
      store_i8(out + c, q);
    }
    totals.sum += reduce_add(sum);
    totals.poison += reduce_add(poison);
  }

 private:
  Normalization norm_;
  const float* multiplier_;
  F32x16 inverse_;
  int count_;
};

// values: [rows, cols, block.count padded to 32], totals: [rows, cols], those of the blocks before
inline void pack_integer_window(const PackedConv& w, const ConvInput& input,
                                const ChannelBlock& block, const Window& window,
                                std::int8_t* values, PixelTotals* totals) {
  const std::ptrdiff_t bytes = w.padded(block.count);
  const std::ptrdiff_t channels = w.channels[static_cast<size_t>(block.source)];
  const float* source = input.sources[static_cast<size_t>(block.source)] + block.first;
  const PixelQuantizer quantizer(w, input, block);
  const int first = std::clamp(-window.first_col, 0, window.cols);
  const int last = std::clamp(input.width - window.first_col, first, window.cols);
  for (int row = 0; row < window.rows; ++row) {
    const int y = window.first_row + row;
    const bool inside = y >= -input.above && y < input.height + input.below;
    const int from = inside ? first : window.cols, to = inside ? last : window.cols;
    values = std::fill_n(values, from * bytes, std::int8_t{0});
    for (int col = from; col < to; ++col, values += bytes) {
      const std::ptrdiff_t pixel =
          static_cast<std::ptrdiff_t>(y) * input.width + window.first_col + col;
      quantizer.quantize(source + pixel * channels, values, totals[col]);
    }
    values = std::fill_n(values, (window.cols - to) * bytes, std::int8_t{0});
    totals += window.cols;
  }
}

}  // namespace fuserve::FUSERVE_ISA
