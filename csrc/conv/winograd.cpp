#include "conv/winograd.h"

#include "conv/epilogue.h"
#include "conv/micro_kernel.h"
#include "conv/window.h"
#include "conv/winograd_transform.h"
#include "linear/tiles.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// Squares of outputs, at most, whose component products are formed together: their sums stay in the
// second-level cache, beside the transformed filters and the squares' inputs of a block.
constexpr int kChunkGroups = 72 / kPixels;
// Planes of components lie an odd number of cache lines apart, or they would share cache sets.
constexpr std::ptrdiff_t kSumPlane = (kChunkGroups * kPixels + 1) * kTileRows;

// A square of Outputs x Outputs pixels is one row of each of the component products. Squares are
// numbered row by row. Filters are transformed a block of channels at a time, where they are used:
// kept, they would be 1.8 or 4 times as large and no longer fit into the caches, and what is read
// of them serves so many multiplications that transforming it anew hardly shows.
template <int Outputs>
struct WinogradUnit {
  static constexpr int kSide = Outputs + 2;
  static constexpr int kComponents = kSide * kSide;
  // Of the transformed filters: [channel][component][16], as they are written, and to the next.
  static constexpr int kFilterStep = (kComponents + 1) * kTileRows;
  static constexpr std::ptrdiff_t kFilterTile = ConvShape::kFilterChannels * kFilterStep;

  const PackedConv& w;
  const ConvInput& input;
  const ConvEpilogue& epilogue;
  const ConvUnit& unit;
  float* out;

  int square_cols() const { return ceil_div(w.out_width(input.width), Outputs); }
  int square_rows() const { return ceil_div(unit.last_row - unit.first_row, Outputs); }
  int squares() const { return square_rows() * square_cols(); }
  // Squares of a chunk; all chunks of a unit are about as large.
  int chunk() const {
    const int groups = ceil_div(squares(), kPixels);
    return ceil_div(groups, ceil_div(groups, kChunkGroups)) * kPixels;
  }
  int groups(int first_square) const {
    return ceil_div(std::min(chunk(), squares() - first_square), kPixels);
  }
  // The transformed input: [block][component][square][channel of the block], as it is read, and to
  // the next component.
  std::ptrdiff_t plane() const {
    return round_up(squares(), kPixels) * ConvShape::kFilterChannels + kTileRows;
  }

  void run(Scratch& scratch) const;
  Fetch next_filters(int index, int tile, int end, int square) const;
  void transform(const ChannelBlock& block, const Window& seen, const float* window,
                 float* transformed) const;
  template <typename Weight>
  void transform_filters(const ChannelBlock& block, int tile, float* filters) const;
  template <int R>
  void products(const ChannelBlock& block, int component, int first_square,
                const float* transformed, const float* filters, float* sums, Fetch& fetch) const;
  void finish(int tile, int first_square, const float* sums) const;
};

template <int Outputs>
void WinogradUnit<Outputs>::run(Scratch& scratch) const {
  const Window seen{unit.first_row - w.top, -w.left, square_rows() * Outputs + 2,
                    square_cols() * Outputs + 2};
  const auto transformed_values = static_cast<size_t>(w.blocks() * kComponents * plane());
  const size_t sums_values = static_cast<size_t>(kTilesAtOnce * kComponents * kSumPlane);
  const auto window_values = static_cast<size_t>(
      round_up(static_cast<int>(seen.pixels()) * w.block_channels(), kTileRows));
  constexpr size_t kFilters = static_cast<size_t>(kTilesAtOnce * kFilterTile);
  auto* transformed =
      scratch.get<float>(transformed_values + sums_values + std::max(window_values, kFilters));
  float* sums = transformed + transformed_values;
  float* window = sums + sums_values;
  float* filters = window;  // the window is not needed any more
  for (int index = 0; index < w.blocks(); ++index) {
    const ChannelBlock block = w.block(index);
    pack_window(w, input, block, seen, window);
    transform(block, seen, window, transformed + index * kComponents * plane());
  }
  for (int tile = unit.first_tile; tile < unit.last_tile; tile += kTilesAtOnce) {
    const int end = std::min(tile + kTilesAtOnce, unit.last_tile);
    for (int square = 0; square < squares(); square += chunk()) {
      for (int index = 0; index < w.blocks(); ++index) {
        const ChannelBlock block = w.block(index);
        for (int t = tile; t < end; ++t) {
          float* to = filters + (t - tile) * kFilterTile;
          w.half ? transform_filters<Half>(block, t, to) : transform_filters<float>(block, t, to);
        }
        Fetch fetch = next_filters(index, tile, end, square);
        for (int component = 0; component < kComponents; ++component)
          for_each_tiles(tile, end, true, [&]<int R>(int t) {
            products<R>(block, component, square, transformed + index * kComponents * plane(),
                        filters + (t - tile) * kFilterTile + component * kTileRows,
                        sums + ((t - tile) * kComponents + component) * kSumPlane, fetch);
          });
      }
      for (int t = tile; t < end; ++t)
        finish(t, square, sums + (t - tile) * kComponents * kSumPlane);
    }
  }
}

// The filters that are wanted after a block of them, a few lines for each call of the kernel.
template <int Outputs>
Fetch WinogradUnit<Outputs>::next_filters(int index, int tile, int end, int square) const {
  const bool last = index + 1 == w.blocks();
  const ChannelBlock next = w.block(last ? 0 : index + 1);
  const size_t at = w.panel_offset(next, 0, last && square + chunk() >= squares() ? end : tile);
  const int value_bytes = w.half ? 2 : 4;
  const int lines = (end - tile) * w.taps() * next.count * kTileRows * value_bytes / 64;
  return {w.data + at * static_cast<size_t>(value_bytes),
          ceil_div(lines, (end - tile) * kComponents * groups(square))};
}

template <int Outputs>
void WinogradUnit<Outputs>::transform(const ChannelBlock& block, const Window& seen,
                                      const float* window, float* transformed) const {
  for (int square = 0; square < squares(); ++square) {
    const int row = square / square_cols() * Outputs, col = square % square_cols() * Outputs;
    const float* from = window + static_cast<std::ptrdiff_t>(row * seen.cols + col) * block.count;
    float* to = transformed + square * ConvShape::kFilterChannels;
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

template <int Outputs>
template <typename Weight>
void WinogradUnit<Outputs>::transform_filters(const ChannelBlock& block, int tile,
                                              float* filters) const {
  const Weight* from = reinterpret_cast<const Weight*>(w.data) + w.panel_offset(block, 0, tile);
  for (int c = 0; c < block.count; ++c, from += kTileRows, filters += kFilterStep) {
    F32x16 g[9], components[kComponents];
    for (int tap = 0; tap < 9; ++tap) g[tap] = load16(from + tap * block.count * kTileRows);
    transform_filter<Outputs>(g, components);
    for (int i = 0; i < kComponents; ++i) store16(filters + i * kTileRows, components[i]);
  }
}

// What a block of channels adds to a component of a chunk of squares for R output tiles.
template <int Outputs>
template <int R>
void WinogradUnit<Outputs>::products(const ChannelBlock& block, int component, int first_square,
                                     const float* transformed, const float* filters, float* sums,
                                     Fetch& fetch) const {
  constexpr int kStride = ConvShape::kFilterChannels;
  const float* from = transformed + component * plane() + first_square * kStride;
  const Taps taps{1, block.count, {0}};
  for (int group = 0; group < groups(first_square); ++group) {
    const float* x[kPixels];
#pragma GCC unroll 16
    for (int t = 0; t < kPixels; ++t) x[t] = from + (group * kPixels + t) * kStride;
    multiply<R, kFilterStep>(x, taps, filters, kFilterTile, block.channel == 0,
                             sums + group * kPixels * kTileRows, kComponents * kSumPlane, fetch);
    fetch.from += 64 * fetch.lines;
  }
}

template <int Outputs>
void WinogradUnit<Outputs>::finish(int tile, int first_square, const float* sums) const {
  const Finisher finisher(w, epilogue, tile, out);
  const int width = w.out_width(input.width);
  const int last = std::min(first_square + chunk(), squares());
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
