#include "conv/direct.h"

#include "conv/epilogue.h"
#include "conv/micro_kernel.h"
#include "conv/window.h"
#include "linear/tiles.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// Positions are output pixels, numbered row by row. They go through the kernel a few at a time; the
// last ones are repeated until there are enough.
struct DirectUnit {
  const PackedConv& w;
  const ConvInput& input;
  const ConvEpilogue& epilogue;
  const ConvUnit& unit;
  float* out;

  int rows() const { return unit.last_row - unit.first_row; }
  int width() const { return w.out_width(input.width); }
  int positions() const { return rows() * width(); }
  int groups() const { return ceil_div(positions(), kPixels); }
  int tiles() const { return unit.last_tile - unit.first_tile; }
  size_t panel_sums() const { return static_cast<size_t>(groups() * kPixels * kTileRows); }

  Window window() const {
    return {unit.first_row * w.stride - w.top, -w.left, (rows() - 1) * w.stride + w.size,
            (width() - 1) * w.stride + w.size};
  }
  Taps taps(const Window& seen, int channels) const {
    Taps taps{w.taps(), channels, {}};
    for (int tap = 0; tap < w.taps(); ++tap)
      taps.offsets[static_cast<size_t>(tap)] =
          static_cast<std::ptrdiff_t>(tap / w.size * seen.cols + tap % w.size) * channels;
    return taps;
  }

  void run(Scratch& scratch) const;
  template <int R>
  void panel(const ChannelBlock& block, const Taps& taps, const float* weights, bool first,
             const float* seen, const int* pixels, float* sums, Fetch fetch) const;
  void finish(int tile, const float* sums) const;
};

void DirectUnit::run(Scratch& scratch) const {
  const Window seen = window();
  const auto panel_values = static_cast<size_t>(w.taps() * w.block_channels() * kTileRows);
  const auto window_values = static_cast<size_t>(
      round_up(static_cast<int>(seen.pixels()) * w.block_channels(), kTileRows));
  const size_t sums_values = static_cast<size_t>(tiles()) * panel_sums();
  auto* sums = scratch.get<float>(sums_values + window_values + kTilesAtOnce * panel_values +
                                  static_cast<size_t>(groups() * kPixels));
  float* packed = sums + sums_values;
  float* room = packed + window_values;
  int* pixels = reinterpret_cast<int*>(room + kTilesAtOnce * panel_values);
  for (int i = 0; i < groups() * kPixels; ++i) {
    const int position = std::min(i, positions() - 1);
    pixels[i] = (position / width() * seen.cols + position % width()) * w.stride;
  }
  for (int index = 0; index < w.blocks(); ++index) {
    const ChannelBlock block = w.block(index);
    pack_window(w, input, block, seen, packed);
    const Taps block_taps = taps(seen, block.count);
    for_each_tiles(unit.first_tile, unit.last_tile, true, [&]<int R>(int tile) {
      const size_t values = static_cast<size_t>(R * w.taps() * block.count * kTileRows);
      const float* weights = widened(w, w.panel_offset(block, tile), values, room);
      // The next panels follow in memory.
      const int bytes = R * static_cast<int>(w.panel_bytes(block.count));
      const Fetch fetch{w.data + w.panel_offset(block, tile + R), ceil_div(bytes, 64 * groups())};
      panel<R>(block, block_taps, weights, index == 0, packed, pixels,
               sums + static_cast<size_t>(tile - unit.first_tile) * panel_sums(), fetch);
    });
  }
  for (int tile = 0; tile < tiles(); ++tile)
    finish(unit.first_tile + tile, sums + static_cast<size_t>(tile) * panel_sums());
}

template <int R>
void DirectUnit::panel(const ChannelBlock& block, const Taps& taps, const float* weights,
                       bool first, const float* seen, const int* pixels, float* sums,
                       Fetch fetch) const {
  const int values = taps.count * block.count * kTileRows;
  for (int group = 0; group < groups(); ++group) {
    const float* x[kPixels];
#pragma GCC unroll 16
    for (int t = 0; t < kPixels; ++t)
      x[t] = seen + static_cast<std::ptrdiff_t>(pixels[group * kPixels + t]) * block.count;
    multiply<R>(x, taps, weights, values, first, sums + group * kPixels * kTileRows,
                static_cast<std::ptrdiff_t>(panel_sums()), fetch);
    fetch.from += 64 * fetch.lines;
  }
}

void DirectUnit::finish(int tile, const float* sums) const {
  const Finisher finisher(w, epilogue, tile, out);
  const std::ptrdiff_t first = static_cast<std::ptrdiff_t>(unit.first_row) * width();
  for (int position = 0; position < positions(); ++position, sums += kTileRows)
    finisher.finish(load16(sums), first + position);
}

}  // namespace

void direct_unit(const PackedConv& w, const ConvInput& input, const ConvEpilogue& epilogue,
                 const ConvUnit& unit, float* out, Scratch& scratch) {
  DirectUnit{w, input, epilogue, unit, out}.run(scratch);
}

}  // namespace fuserve::FUSERVE_ISA
