// What Winograd's products are formed of: floats, or the int8 of two channels in 16 bits each,
// whose sums of products are exact.
#pragma once

#include "conv/integer_window.h"
#include "conv/micro_kernel.h"
#include "conv/window.h"
#include "conv/winograd_transform.h"

namespace fuserve::FUSERVE_ISA {

// From one channel, or pair, to the next in transformed filters: components, and one that is left
// out so that the next stand in other cache sets.
template <int Components>
inline constexpr int kFilterStep = (Components + 1) * kTileRows;

class FloatNumbers {
 public:
  using Value = float;                 // of the transformed input and filters
  using Pixel = float;                 // a channel of it, before
  static constexpr int kChannels = 1;  // of a value
  static constexpr int kBlockValues = ConvShape::kFilterFloats;

  FloatNumbers(const PackedConv& w, const Window& seen, float*) : w_(w), seen_(seen) {}

  // What is kept of a unit's pixels and outputs.
  static size_t kept_values(const Window&, int) { return 0; }
  void pack(const ConvInput& input, const ChannelBlock& block, float* window) const {
    pack_window(w_, input, block, seen_, window);
  }
  template <int Side>
  void total(int, int) const {}
  // Sums as the output has them.
  template <int Side>
  auto scaling(int) const {
    return [](F32x16 sums, int) { return sums; };
  }

  static F32x16 load(const float* p, int n) { return load_up_to_16(p, n); }
  static void store(float* p, F32x16 v, int n) { n >= 16 ? store16(p, v) : store_n(p, v, n); }

  // filters: [channel][component][16], kFilterStep apart
  template <int Side>
  static void transform_filters(const PackedConv& w, const ChannelBlock& block, int tile,
                                float* filters) {
    const std::uint8_t* panel = w.data + w.panel_offset(block, tile);
    if (w.is_half())
      transform_panel<Side>(reinterpret_cast<const Half*>(panel), block.count, filters);
    else
      transform_panel<Side>(reinterpret_cast<const float*>(panel), block.count, filters);
  }

 private:
  template <int Side, typename Weight>
  static void transform_panel(const Weight* panel, int count, float* filters) {
    constexpr int kComponents = Side * Side;
    for (int c = 0; c < count; ++c, panel += kTileRows, filters += kFilterStep<kComponents>) {
      F32x16 g[9], components[kComponents];
      for (int tap = 0; tap < 9; ++tap) g[tap] = load16(panel + tap * count * kTileRows);
      transform_filter<Side>(g, components);
      for (int i = 0; i < kComponents; ++i) store16(filters + i * kTileRows, components[i]);
    }
  }

  const PackedConv& w_;
  const Window& seen_;
};

class PairNumbers {
 public:
  using Value = ShortPair;
  using Pixel = std::int8_t;
  static constexpr int kChannels = 2;
  static constexpr int kBlockValues = ConvShape::kFilterBytes / 2;

  PairNumbers(const PackedConv& w, const Window& seen, ShortPair* kept)
      : w_(w),
        seen_(seen),
        totals_(reinterpret_cast<PixelTotals*>(kept)),
        scales_(reinterpret_cast<float*>(totals_ + seen.pixels())) {
    std::fill_n(totals_, seen.pixels(), PixelTotals{});
  }

  static size_t kept_values(const Window& seen, int outputs) {
    return seen.pixels() * sizeof(PixelTotals) / 4 + static_cast<size_t>(outputs);
  }
  void pack(const ConvInput& input, const ChannelBlock& block, std::int8_t* window) const {
    pack_integer_window(w_, input, block, seen_, window, totals_);
  }
  // What the sums of each output stand for, NaN where it sees one.
  template <int Side>
  void total(int rows, int cols) const {
    for (int row = 0; row < rows; ++row)
      for (int col = 0; col < cols; ++col) {
        float& scale = scales_[row * cols + col] = w_.input_scale;
        for (int tap = 0; tap < 9; ++tap) {
          const int y = row + tap / 3, x = col + tap % 3;
          scale += totals_[Side == 3 ? (y + 1) / 2 * seen_.cols + (x + 1) / 2 : y * seen_.cols + x]
                       .poison;
        }
      }
  }
  template <int Side>
  auto scaling(int tile) const {
    const F32x16 scales = load16(w_.scales + static_cast<std::ptrdiff_t>(tile) * kTileRows);
    return [scales, outputs = scales_](I32x16 sums, int output) {
      const F32x16 scale = mul(set1(outputs[output]), scales);
      return mul(to_float(Side == 4 ? quarter(sums) : sums), scale);
    };
  }

  // Blocks are padded to whole vectors.
  static I16x32 load(const std::int8_t* p, int) { return widen(p); }
  static void store(ShortPair* p, I16x32 v, int) { store16(p, v); }

  // filters: [pair of channels][component][16], kFilterStep apart
  template <int Side>
  static void transform_filters(const PackedConv& w, const ChannelBlock& block, int tile,
                                ShortPair* filters) {
    constexpr int kComponents = Side * Side, kQuad = 4 * kTileRows;
    const std::uint8_t* panel = w.data + w.panel_offset(block, tile);
    const int padded = w.padded(block.count);
    for (int c = 0; c < padded; c += 4, panel += kQuad, filters += 2 * kFilterStep<kComponents>) {
      // Four channels of the first eight outputs, and of the others.
      I16x32 halves[2][kComponents];
      for (int half = 0; half < 2; ++half) {
        I16x32 g[9];
        for (int tap = 0; tap < 9; ++tap)
          g[tap] = widen_codes(panel + tap * padded * kTileRows + half * kQuad / 2);
        transform_filter<Side>(g, halves[half]);
      }
      for (int i = 0; i < kComponents; ++i) {
        ShortPair* to = filters + i * kTileRows;
        store16(to, first_pairs(halves[0][i], halves[1][i]));
        store16(to + kFilterStep<kComponents>, second_pairs(halves[0][i], halves[1][i]));
      }
    }
  }

 private:
  const PackedConv& w_;
  const Window& seen_;
  PixelTotals* totals_;
  float* scales_;
};

}  // namespace fuserve::FUSERVE_ISA
