// Convolutions over NHWC images: their shapes, packed weights, inputs and epilogues.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "linear/format.h"

namespace fuserve {

enum class ConvMethod : int {
  direct = 0,
  winograd2 = 1,  // F(2x2, 3x3) of arXiv 1509.09308
  winograd4 = 2   // F(4x4, 3x3)
};

// What weights are kept as. Those of 8 bits multiply inputs of 8 bits.
enum class ConvWeights : int { f32 = 0, f16 = 1, i8 = 2 };

enum class ConvActivation : int { none = 0, relu = 1, silu = 2 };

// Input channels whose weights are packed together, all of one source.
struct ChannelBlock {
  int source;
  int first;    // in the source
  int channel;  // in the concatenation of the sources
  int count;
};

struct ConvShape {
  std::array<int, 2> channels{};  // of one or two sources; the second is 0 without it
  int out_channels = 0;
  int size = 3;    // 1 or 3
  int stride = 1;  // 1 or 2
  int top = 0, left = 0, bottom = 0, right = 0;
  bool upsample = false;  // nearest 2x before: size 3, stride 1, padding 1
  ConvMethod method = ConvMethod::direct;
  ConvWeights weights = ConvWeights::f32;

  bool has_method(ConvMethod m) const {
    if (m == ConvMethod::direct) return !upsample;
    if (m == ConvMethod::winograd4 && (upsample || is_integer())) return false;
    return size == 3 && stride == 1;
  }
  bool is_integer() const { return weights == ConvWeights::i8; }
  bool is_half() const { return weights == ConvWeights::f16; }
  bool is_winograd() const { return method != ConvMethod::direct; }
  // Of int8, whose sum fits 32 bits: up to 255 * 127 each, or four times 127 * 127 in F(2x2).
  int most_products() const { return is_winograd() && !upsample ? 1 << 15 : 1 << 16; }
  int in_channels() const { return channels[0] + channels[1]; }
  int tiles() const { return ceil_div(out_channels, kTileRows); }
  int taps() const { return size * size; }

  // Winograd: rows of outputs of a square, rows of what is multiplied for it, and its component
  // products. Of an upsampled image a square of outputs sees neighbours that are equal, so that
  // seven of sixteen components are zero.
  int square_outputs() const { return method == ConvMethod::winograd4 ? 4 : 2; }
  int square_side() const { return upsample ? 3 : square_outputs() + 2; }
  int components() const { return square_side() * square_side(); }

  int out_height(int height) const { return extent(height, top + bottom); }
  int out_width(int width) const { return extent(width, left + right); }
  // Output rows that units begin at multiples of.
  int row_step() const { return is_winograd() ? square_outputs() : 1; }

  // A panel of 16 outputs of a block is at most half of a 32 KB first-level cache. In int8 a block
  // of a 3x3 filter is a cache line of each pixel.
  int block_channels() const {
    if (is_integer()) return size == 3 ? kFilterBytes : 512;
    return size == 3 ? kFilterFloats : 256;
  }
  static constexpr int kFilterFloats = 32, kFilterBytes = 64;  // of a block, with 3x3 filters
  int blocks_of(int source) const {
    return ceil_div(channels[static_cast<size_t>(source)], block_channels());
  }
  int blocks() const { return blocks_of(0) + blocks_of(1); }
  ChannelBlock block(int index) const {
    const int source = index < blocks_of(0) ? 0 : 1;
    const int first = (index - source * blocks_of(0)) * block_channels();
    const int left_over = channels[static_cast<size_t>(source)] - first;
    return {source, first, source * channels[0] + first,
            left_over < block_channels() ? left_over : block_channels()};
  }

  // Packed weights are the same for every method: [block][tile] panels of [tap][channel][16] in
  // floats, of [tap][four channels][16][4] in bytes, which are q + 128 and whose channels are
  // padded to 32 in each source.
  size_t value_bytes() const { return is_integer() ? 1 : is_half() ? 2 : 4; }
  int padded(int count) const { return is_integer() ? round_up(count, kBlockCols) : count; }
  size_t panel_bytes(int count) const {
    return static_cast<size_t>(taps() * kTileRows) * static_cast<size_t>(padded(count)) *
           value_bytes();
  }
  size_t panel_offset(const ChannelBlock& at, int tile) const {
    const int channel = at.source * padded(channels[0]) + at.first;
    return panel_bytes(channel) * static_cast<size_t>(tiles()) +
           panel_bytes(at.count) * static_cast<size_t>(tile);
  }
  size_t packed_bytes() const {
    return panel_bytes(padded(channels[0]) + padded(channels[1])) * static_cast<size_t>(tiles());
  }

 private:
  int extent(int in, int padding) const {
    return upsample ? 2 * in : (in + padding - size) / stride + 1;
  }
};

struct PackedConv : ConvShape {
  const std::uint8_t* data = nullptr;
  const float* bias = nullptr;  // [tiles * 16], zero in the padding; null: none
  // In int8: the input x stands for round(x * multiplier / input_scale), the sums of the products
  // for sum * input_scale * scales.
  float input_scale = 0.0F;
  const float* multiplier = nullptr;  // [in channels]; null: one everywhere
  const float* scales = nullptr;      // [tiles * 16]
};

// One image, before padding and upsampling. What the product sees of it is x * scale + shift, where
// a GroupNorm came down to that, and SiLU of it where asked; padding is zero after both.
struct ConvInput {
  std::array<const float*, 2> sources{};  // [height, width, channels of the source] each
  int height = 0;
  int width = 0;
  int above = 0;  // rows in memory before the first, of a taller image; padding lies beyond them
  int below = 0;
  const float* scale = nullptr;  // [in channels], with shift; null: none
  const float* shift = nullptr;
  bool silu = false;
};

// What becomes of a product, in this order; null: nothing. All of one image.
struct ConvEpilogue {
  const float* channel_add = nullptr;  // [out channels]
  const float* residual = nullptr;     // [out height, out width, out channels]; may be the output
  ConvActivation activation = ConvActivation::none;
};

// Output rows [first_row, last_row) of 16-channel tiles [first_tile, last_tile) of an image;
// first_row is a multiple of row_step(), and so is last_row but at the image's end. In a band of a
// taller image the multiples are counted from the image's first row; then first_row may be
// negative: such rows are computed where a method does so with others, and left out.
struct ConvUnit {
  int first_row, last_row;
  int first_tile, last_tile;
};

// How a batch is cut into units.
struct ConvUnits {
  int out_height;
  int tiles;
  int band_rows;
  int unit_tiles;
  int rows_before = 0;  // since the last multiple of row_step() in the taller image

  int bands() const { return ceil_div(out_height + rows_before, band_rows); }
  int parts() const { return ceil_div(tiles, unit_tiles); }
  int per_image() const { return bands() * parts(); }
  // Unit `index` of an image.
  ConvUnit unit(int index) const {
    const int row = index / parts() * band_rows - rows_before;
    const int tile = index % parts() * unit_tiles;
    return {row, row + band_rows < out_height ? row + band_rows : out_height, tile,
            tile + unit_tiles < tiles ? tile + unit_tiles : tiles};
  }
};

// A cut that keeps a unit's sums in the caches, packs little of the input twice and gives every
// thread its share. Results do not depend on it. first_row: of the output in a taller image.
ConvUnits conv_units(const ConvShape& shape, int batch, int height, int width, int num_threads,
                     int first_row = 0);

}  // namespace fuserve
