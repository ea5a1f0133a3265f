#include <algorithm>

#include "conv/conv_types.h"

namespace fuserve {
namespace {

// Rough costs in cycles, for choosing among cuts alone: sixteen multiply-adds are one.
constexpr double kPackValue = 0.3;        // normalizing a value of the input
constexpr double kQuantizeValue = 3.0;    // with SiLU
constexpr double kIntegerRate = 2.3;      // multiply-adds of int8, over fp32's
constexpr double kTransformValue = 0.6;   // a component of a value of the input
constexpr double kTransformWeight = 3.0;  // a component of sixteen weights, for a chunk of squares
constexpr int kChunkSquares = 72;
constexpr double kWeightByte = 0.1;  // reading weights, of which prefetching hides much
constexpr double kSpilledSum = 0.3;  // a sum that leaves the second-level cache, for each block
constexpr double kCachedSums = 64e3;
constexpr double kMostTransformed = 1.5e6;  // transformed values, in the last-level cache
constexpr double kMostScratch = 3e6;  // values that a unit keeps: a thread's memory, never cached

int squares_of(const ConvShape& shape, int width, int rows) {
  const int m = shape.square_outputs();
  return ceil_div(rows, m) * ceil_div(width, m);
}

// Of a component: a value is a channel in floats, or two in int8.
double winograd_values(const ConvShape& shape) {
  return shape.is_integer() ? shape.in_channels() / 2.0 : shape.in_channels();
}

double cost(const ConvShape& shape, int width, int rows, int tiles) {
  const double channels = shape.in_channels(), pixels = double{1} * rows * width;
  const double step = shape.upsample ? 0.5 : shape.stride;
  const double window = (rows * step + shape.size - 1) * (width * step + shape.size - 1);
  const double pack = (shape.is_integer() ? kQuantizeValue : kPackValue) * window * channels;
  const double weights =
      kWeightByte * static_cast<double>(shape.packed_bytes()) * tiles / shape.tiles();
  if (!shape.is_winograd()) {
    const double sums = pixels * tiles * kTileRows;
    const double spilled = sums > kCachedSums ? kSpilledSum * sums * shape.blocks() : 0.0;
    const double products = pixels * channels * shape.taps() * tiles;
    return (shape.is_integer() ? products / kIntegerRate : products) + pack + weights + spilled;
  }
  const int squares = squares_of(shape, width, rows);
  const double values = shape.components() * winograd_values(shape);
  const double transformed = squares * values;
  const double filters = kTransformWeight * ceil_div(squares, kChunkSquares) * values * tiles;
  const double total = transformed * (tiles + kTransformValue) + filters + pack + weights;
  return transformed > kMostTransformed ? 2.0 * total : total;
}

// Values that a unit keeps beside its input and output.
double scratch(const ConvShape& shape, int width, int rows, int tiles) {
  const double pixels = double{1} * rows * width;
  const double window = pixels * shape.stride * shape.stride;
  if (!shape.is_winograd()) {
    const double kept = shape.block_channels() / (shape.is_integer() ? 4.0 : 1.0);  // in floats
    return pixels * tiles * kTileRows + window * kept;
  }
  return squares_of(shape, width, rows) * shape.components() * winograd_values(shape);
}

}  // namespace

ConvUnits conv_units(const ConvShape& shape, int batch, int height, int width, int num_threads,
                     int first_row) {
  const int tiles = shape.tiles(), step = shape.row_step();
  const int rows = shape.out_height(height), before = first_row % step;
  ConvUnits best{rows, tiles, step, tiles, before};
  double best_cost = 0.0;
  for (int bands = ceil_div(rows + before, step); bands > 0; --bands)
    for (int parts = 1; parts <= std::min(tiles, 4 * num_threads); ++parts) {
      const ConvUnits cut{rows, tiles, round_up(ceil_div(rows + before, bands), step),
                          ceil_div(tiles, parts), before};
      const bool is_large =
          scratch(shape, shape.out_width(width), cut.band_rows, cut.unit_tiles) > kMostScratch;
      if (is_large && best_cost != 0.0) continue;  // wide images leave no choice but the smallest
      const int in_turn = ceil_div(batch * cut.per_image(), num_threads);
      const double total =
          in_turn * cost(shape, shape.out_width(width), cut.band_rows, cut.unit_tiles);
      if (best_cost == 0.0 || total < best_cost) {
        best = cut;
        best_cost = total;
      }
    }
  return best;
}

}  // namespace fuserve
