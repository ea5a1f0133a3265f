#include "conv/winograd.h"

#include "conv/epilogue.h"
#include "conv/micro_kernel.h"
#include "conv/window.h"
#include "conv/winograd_transform.h"
#include "linear/tiles.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// Squares of outputs whose component products are formed together, and output tiles: their sums
// stay in the second-level cache, beside one component of the squares' inputs.
constexpr int kChunkGroups = 48 / kPixels;
constexpr int kChunk = kChunkGroups * kPixels;
constexpr int kTileSet = 2;
constexpr int kPanelChannels = 256;
// Planes of components lie an odd number of cache lines apart, or they would share cache sets.
constexpr std::ptrdiff_t kSumPlane = (kChunk + 1) * kTileRows;

// A square of Outputs x Outputs pixels is one row of each of the component products. Squares are
// numbered row by row.
template <int Outputs>
struct WinogradUnit {
  static constexpr int kSide = Outputs + 2;
  static constexpr int kComponents = kSide * kSide;

  const PackedConv& w;
  const ConvInput& input;
  const ConvEpilogue& epilogue;
  const ConvUnit& unit;
  float* out;

  int square_cols() const { return ceil_div(w.out_width(input.width), Outputs); }
  int square_rows() const { return ceil_div(unit.last_row - unit.first_row, Outputs); }
  int squares() const { return square_rows() * square_cols(); }
  // Of the transformed input: [component][square][channel]
  std::ptrdiff_t square_stride() const { return round_up(w.in_channels(), kTileRows) + kTileRows; }
  std::ptrdiff_t plane() const {
    const std::ptrdiff_t values = round_up(squares(), kPixels) * square_stride();
    return values + (values / kTileRows % 2 == 0 ? kTileRows : 0);
  }

  void run(Scratch& scratch) const;
  void transform(const ChannelBlock& block, const Window& seen, const float* window,
                 float* transformed) const;
  template <int R>
  void products(int tile, int component, int first_square, const float* transformed, float* room,
                float* sums) const;
  void finish(int tile, int first_square, const float* sums) const;
};

template <int Outputs>
void WinogradUnit<Outputs>::run(Scratch& scratch) const {
  const Window seen{unit.first_row - w.top, -w.left, square_rows() * Outputs + 2,
                    square_cols() * Outputs + 2};
  const auto transformed_values = static_cast<size_t>(kComponents * plane());
  const size_t sums_values = static_cast<size_t>(kTileSet * kComponents * kSumPlane);
  const auto window_values = static_cast<size_t>(
      round_up(static_cast<int>(seen.pixels()) * w.block_channels(), kTileRows));
  constexpr size_t kRoom = static_cast<size_t>(kTilesAtOnce * kPanelChannels * kTileRows);
  auto* transformed =
      scratch.get<float>(transformed_values + sums_values + std::max(window_values, kRoom));
  float* sums = transformed + transformed_values;
  float* window = sums + sums_values;
  float* room = window;  // the window is not needed any more
  for (int index = 0; index < w.blocks(); ++index) {
    const ChannelBlock block = w.block(index);
    pack_window(w, input, block, seen, window);
    transform(block, seen, window, transformed);
  }
  for (int tile = unit.first_tile; tile < unit.last_tile; tile += kTileSet) {
    const int end = std::min(tile + kTileSet, unit.last_tile);
    for (int square = 0; square < squares(); square += kChunk) {
      for (int component = 0; component < kComponents; ++component)
        for_each_tiles(tile, end, true, [&]<int R>(int t) {
          products<R>(t, component, square, transformed, room,
                      sums + ((t - tile) * kComponents + component) * kSumPlane);
        });
      for (int t = tile; t < end; ++t)
        finish(t, square, sums + (t - tile) * kComponents * kSumPlane);
    }
  }
}

template <int Outputs>
void WinogradUnit<Outputs>::transform(const ChannelBlock& block, const Window& seen,
                                      const float* window, float* transformed) const {
  for (int square = 0; square < squares(); ++square) {
    const int row = square / square_cols() * Outputs, col = square % square_cols() * Outputs;
    const float* from = window + static_cast<std::ptrdiff_t>(row * seen.cols + col) * block.count;
    float* to = transformed + square * square_stride() + block.channel;
    for (int c = 0; c < block.count; c += kTileRows) {
      const int n = std::min(kTileRows, block.count - c);
      F32x16 d[kComponents];
      for (int i = 0; i < kComponents; ++i) {
        const float* p =
            from + static_cast<std::ptrdiff_t>(i / kSide * seen.cols + i % kSide) * block.count + c;
        d[i] = n == kTileRows ? load16(p) : load_n(p, n);
      }
      transform_input<Outputs>(d);
      for (int i = 0; i < kComponents; ++i) {
        if (n == kTileRows)
          store16(to + i * plane() + c, d[i]);
        else
          store_n(to + i * plane() + c, d[i], n);
      }
    }
  }
}

// A component of up to kChunk squares for R output tiles.
template <int Outputs>
template <int R>
void WinogradUnit<Outputs>::products(int tile, int component, int first_square,
                                     const float* transformed, float* room, float* sums) const {
  const int groups = std::min(kChunkGroups, ceil_div(squares() - first_square, kPixels));
  const std::ptrdiff_t stride = square_stride();
  const float* from = transformed + component * plane() + first_square * stride;
  const size_t value_bytes = w.half ? 2 : 4;
  for (int channel = 0; channel < w.in_channels(); channel += kPanelChannels) {
    const int channels = std::min(kPanelChannels, w.in_channels() - channel);
    const auto values = static_cast<size_t>(channels * kTileRows);
    const size_t offset =
        w.component_offset(tile, component) + static_cast<size_t>(channel * kTileRows);
    std::ptrdiff_t panel_stride = w.component_offset(1, 0);
    const float* panel = nullptr;
    if (w.half) {
      for (int r = 0; r < R; ++r)
        widened(w, offset + static_cast<size_t>(r * panel_stride), values,
                room + r * kPanelChannels * kTileRows);
      panel = room;
      panel_stride = kPanelChannels * kTileRows;
    } else {
      panel = widened(w, offset, values, nullptr);
    }
    // The next component of the same tile follows in memory.
    const auto next = offset + w.component_offset(0, 1);
    Fetch fetch{w.data + next * value_bytes,
                ceil_div(static_cast<int>(values * value_bytes), 64 * groups)};
    const Taps taps{1, channels, {channel}};
    for (int group = 0; group < groups; ++group) {
      const float* x[kPixels];
#pragma GCC unroll 16
      for (int t = 0; t < kPixels; ++t) x[t] = from + (group * kPixels + t) * stride;
      multiply<R>(x, taps, panel, panel_stride, channel == 0, sums + group * kPixels * kTileRows,
                  kComponents * kSumPlane, fetch);
      fetch.from += 64 * fetch.lines;
    }
  }
}

template <int Outputs>
void WinogradUnit<Outputs>::finish(int tile, int first_square, const float* sums) const {
  const Finisher finisher(w, epilogue, tile, out);
  const int width = w.out_width(input.width);
  const int last = std::min(first_square + kChunk, squares());
  for (int square = first_square; square < last; ++square, sums += kTileRows) {
    F32x16 m[kComponents];
    for (int i = 0; i < kComponents; ++i) m[i] = load16(sums + i * kSumPlane);
    transform_output<Outputs>(m);
    const int row = unit.first_row + square / square_cols() * Outputs;
    const int col = square % square_cols() * Outputs;
    const int rows = std::min(Outputs, unit.last_row - row), cols = std::min(Outputs, width - col);
    for (int y = std::max(0, -row); y < rows; ++y)
      for (int x = 0; x < cols; ++x)
        finisher.finish(m[y * kSide + x], static_cast<std::ptrdiff_t>(row + y) * width + col + x);
  }
}

}  // namespace

void winograd_unit(const PackedConv& w, const ConvInput& input, const ConvEpilogue& epilogue,
                   const ConvUnit& unit, float* out, Scratch& scratch) {
  if (w.method == ConvMethod::winograd4)
    WinogradUnit<4>{w, input, epilogue, unit, out}.run(scratch);
  else
    WinogradUnit<2>{w, input, epilogue, unit, out}.run(scratch);
}

}  // namespace fuserve::FUSERVE_ISA
