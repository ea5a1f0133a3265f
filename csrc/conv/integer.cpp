#include "conv/integer.h"

#include "conv/epilogue.h"
#include "conv/integer_window.h"
#include "linear/tiles.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// A block of an image's window, and a panel of weights for it.
struct Operands {
  const std::int8_t* values;   // [pixels, bytes]
  std::ptrdiff_t bytes;        // of a pixel
  const std::uint8_t* panel;   // [tap][bytes / 4][16][4], for each tile
  std::ptrdiff_t panel_bytes;  // of a tile
};

// Positions are output pixels, numbered row by row. They go through the kernel a few neighbours of
// a line at a time.
struct IntegerUnit {
  const PackedConv& w;
  const ConvInput& input;
  const ConvEpilogue& epilogue;
  const ConvUnit& unit;
  float* out;

  int rows() const { return unit.last_row - unit.first_row; }
  int width() const { return w.out_width(input.width); }
  int positions() const { return rows() * width(); }
  int tiles() const { return unit.last_tile - unit.first_tile; }
  size_t tile_sums() const { return static_cast<size_t>(positions() * kTileRows); }
  // Without a filter's edges, all rows are one line.
  bool is_flat() const { return w.size == 1 && w.stride == 1 && width() == input.width; }
  int lines() const { return is_flat() ? 1 : rows(); }
  int line_positions() const { return is_flat() ? positions() : width(); }

  Window window() const {
    return {unit.first_row * w.stride - w.top, -w.left, (rows() - 1) * w.stride + w.size,
            (width() - 1) * w.stride + w.size};
  }

  void run(Scratch& scratch) const;
  template <int Quads>
  void multiply(const ChannelBlock& block, const Window& seen, const std::int8_t* values,
                const LooseQuad* loose, int num_loose, std::int32_t* sums) const;
  template <int Quads, int R>
  void lines_product(const Window& seen, const Operands& x, bool first, std::int32_t* sums) const;
  template <int Quads, int T, int R>
  void product(const Window& seen, const Operands& x, bool first, std::int32_t* sums) const;
  template <class Sums>
  void add_loose(const ChannelBlock& block, const Window& seen, const LooseQuad& quad,
                 std::int32_t* sums) const;
  void finish(const Window& seen, const PixelTotals* totals, const std::int32_t* sums,
              PixelTotals* position_totals) const;
};

void IntegerUnit::run(Scratch& scratch) const {
  const Window seen = window();
  const size_t bytes = seen.pixels() * static_cast<size_t>(w.block_channels());
  const size_t sums_bytes = 4 * static_cast<size_t>(tiles()) * tile_sums();
  const size_t loose_bytes =
      sizeof(LooseQuad) * static_cast<size_t>(most_loose_quads(static_cast<int>(bytes)));
  const size_t totals_bytes =
      sizeof(PixelTotals) * (seen.pixels() + static_cast<size_t>(positions()));
  auto* sums = scratch.get<std::int32_t>((sums_bytes + bytes + loose_bytes + totals_bytes) / 4);
  auto* values = reinterpret_cast<std::int8_t*>(sums + sums_bytes / 4);
  auto* loose = reinterpret_cast<LooseQuad*>(values + bytes);
  auto* totals = reinterpret_cast<PixelTotals*>(values + bytes + loose_bytes);
  std::fill_n(totals, seen.pixels(), PixelTotals{});
  for (int index = 0; index < w.blocks(); ++index) {
    const ChannelBlock block = w.block(index);
    pack_integer_window(w, input, block, seen, values, totals);
    // For sums of 16 bits the window is one row.
    const int length = static_cast<int>(seen.pixels()) * round_up(block.count, kBlockCols);
    const LooseQuads taken = take_out_quads(values, length, loose);
    if (kQuadsPerSum < 2 || taken.quads_per_sum == 2)
      multiply<kQuadsPerSum>(block, seen, values, loose, taken.count, sums);
    else
      multiply<std::min(kQuadsPerSum, 1)>(block, seen, values, loose, taken.count, sums);
  }
  finish(seen, totals, sums, totals + seen.pixels());
}

// A block's part of all sums of the unit.
template <int Quads>
void IntegerUnit::multiply(const ChannelBlock& block, const Window& seen, const std::int8_t* values,
                           const LooseQuad* loose, int num_loose, std::int32_t* sums) const {
  const bool first = block.channel == 0;
  for_each_tiles(unit.first_tile, unit.last_tile, true, [&]<int R>(int tile) {
    Operands x{values, round_up(block.count, kBlockCols), w.data + w.panel_offset(block, tile), 0};
    x.panel_bytes = x.bytes * w.taps() * kTileRows;
    std::int32_t* tile_start = sums + static_cast<size_t>(tile - unit.first_tile) * tile_sums();
    lines_product<Quads, R>(seen, x, first, tile_start);
  });
  if constexpr (Quads > 0)
    for (int i = 0; i < num_loose; ++i) add_loose<I32x16>(block, seen, loose[i], sums);
}

template <int Quads, int R>
void IntegerUnit::lines_product(const Window& seen, const Operands& x, bool first,
                                std::int32_t* sums) const {
  const int passes = ceil_div(line_positions(), kByteDotTokens);
  // The next panels follow in memory.
  const std::uint8_t* next = x.panel + R * x.panel_bytes;
  const int fetched = ceil_div(static_cast<int>(R * x.panel_bytes), 64 * lines() * passes);
  for (int line = 0; line < lines(); ++line) {
    Operands at = x;
    at.values += static_cast<std::ptrdiff_t>(line) * w.stride * seen.cols * x.bytes;
    // Positions are spread evenly over the passes: nine are three times three.
    for (int pass = 0, position = 0; pass < passes; ++pass) {
      for (int i = 0; i < fetched; ++i, next += 64) prefetch(next);
      const int count = ceil_div(line_positions() - position, passes - pass);
      with_count<kByteDotTokens>(count,
                                 [&]<int T>() { product<Quads, T, R>(seen, at, first, sums); });
      position += count;
      at.values += count * w.stride * x.bytes;
      sums += count * kTileRows;
    }
  }
}

// T neighbours from x.values on times R tiles.
template <int Quads, int T, int R>
void IntegerUnit::product(const Window& seen, const Operands& x, bool first,
                          std::int32_t* sums) const {
  const auto sum_stride = static_cast<std::ptrdiff_t>(tile_sums());
  I32x16 acc[R][T];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      acc[r][t] = first ? set1_i32(0) : load_i32(sums + r * sum_stride + t * kTileRows);
  const std::uint8_t* panel = x.panel;
  for (int row = 0; row < w.size; ++row)
    for (int col = 0; col < w.size; ++col) {
      const std::int8_t* values =
          x.values + static_cast<std::ptrdiff_t>(row * seen.cols + col) * x.bytes;
      for (std::ptrdiff_t k = 0; k < x.bytes; k += kBlockCols, panel += kBlockCols * kTileRows)
        add_byte_dot<Quads>(panel, x.panel_bytes, values + k, w.stride * x.bytes, acc);
    }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) store_i32(sums + r * sum_stride + t * kTileRows, acc[r][t]);
}

// A quad that was taken out of the window, to all the outputs that see it. A template, as
// add_loose_quad is.
template <class Sums>
void IntegerUnit::add_loose(const ChannelBlock& block, const Window& seen, const LooseQuad& quad,
                            std::int32_t* sums) const {
  const int bytes = w.padded(block.count);
  const int pixel = quad.first / bytes, channel = quad.first % bytes;
  const auto panel_bytes = static_cast<std::ptrdiff_t>(w.panel_bytes(block.count));
  const std::uint8_t* panel = w.data + w.panel_offset(block, unit.first_tile);
  for (int tap = 0; tap < w.taps(); ++tap) {
    const int y = pixel / seen.cols - tap / w.size, column = pixel % seen.cols - tap % w.size;
    if (y < 0 || column < 0 || y % w.stride != 0 || column % w.stride != 0) continue;
    const int row = y / w.stride, col = column / w.stride;
    if (row >= rows() || col >= width()) continue;
    const std::uint8_t* weights =
        panel + static_cast<std::ptrdiff_t>(tap * bytes + channel) * kTileRows;
    std::int32_t* sum = sums + static_cast<std::ptrdiff_t>(row * width() + col) * kTileRows;
    for (int tile = 0; tile < tiles(); ++tile, weights += panel_bytes, sum += tile_sums()) {
      Sums total = load_i32(sum);
      add_loose_quad(weights, quad.values, total);
      store_i32(sum, total);
    }
  }
}

void IntegerUnit::finish(const Window& seen, const PixelTotals* totals, const std::int32_t* sums,
                         PixelTotals* position_totals) const {
  for (int position = 0; position < positions(); ++position) {
    const PixelTotals* corner =
        totals + position / width() * w.stride * seen.cols + position % width() * w.stride;
    PixelTotals& all = position_totals[position] = {};
    for (int tap = 0; tap < w.taps(); ++tap) {
      const PixelTotals& one = corner[tap / w.size * seen.cols + tap % w.size];
      all.sum += one.sum;
      all.poison += one.poison;
    }
  }
  for (int tile = unit.first_tile; tile < unit.last_tile; ++tile) {
    const Finisher finisher(w, epilogue, tile, out);
    const F32x16 scales = load16(w.scales + static_cast<std::ptrdiff_t>(tile) * kTileRows);
    for (int position = 0; position < positions(); ++position, sums += kTileRows) {
      const PixelTotals& all = position_totals[position];
      const I32x16 sum = add(load_i32(sums), set1_i32(-kByteDotOffset * all.sum));
      const F32x16 scale = mul(set1(w.input_scale + all.poison), scales);
      finisher.finish(mul(to_float(sum), scale),
                      static_cast<std::ptrdiff_t>(unit.first_row) * width() + position);
    }
  }
}

}  // namespace

void integer_unit(const PackedConv& w, const ConvInput& input, const ConvEpilogue& epilogue,
                  const ConvUnit& unit, float* out, Scratch& scratch) {
  IntegerUnit{w, input, epilogue, unit, out}.run(scratch);
}

}  // namespace fuserve::FUSERVE_ISA
