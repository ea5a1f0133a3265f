#include "linear/channel_product.h"

#include <algorithm>

#include "linear/tiles.h"

namespace fuserve::FUSERVE_ISA {
namespace {

constexpr int kHeader = header_bytes(WeightFormat::q8_channel);
constexpr int kBlock = block_bytes(WeightFormat::q8_channel);

const float* row_scales(const std::uint8_t* tile) { return reinterpret_cast<const float*>(tile); }

// Passes over the rows share the fetching of the weights that come next, so that memory is read all
// the time that arithmetic is done.
struct Pass {
  int number;
  int count;
};

template <int T, int R>
void add_loose_quads(const std::uint8_t* weights, std::ptrdiff_t tile_stride, const TokenRows& x,
                     int row, I32x16 (&acc)[R][T]) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    const LooseQuad* quad = x.loose_quads_of(row + t);
    const LooseQuad* end = quad + x.header(row + t).loose.count;
    for (; quad != end; ++quad)
      for (int r = 0; r < R; ++r)
        add_loose_quad(weights + r * tile_stride + quad->first / 4 * 64, quad->values, acc[r][t]);
  }
}

// T rows times R tiles, so many quads of the rows in one sum of the instruction set's.
template <int Quads, int T, int R>
void byte_kernel(const PackedLinear& w, const std::uint8_t* tile, const TokenRows& x, int row,
                 Pass pass, float* out, std::ptrdiff_t out_stride) {
  const auto tile_stride = static_cast<std::ptrdiff_t>(w.tile_bytes());
  const auto stride = static_cast<std::ptrdiff_t>(x.layout.stride());
  const std::int8_t* values = x.record(row);
  I32x16 acc[R][T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    const I32x16 start = set1_i32(-kByteDotOffset * x.header(row + t).sum);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r][t] = start;
  }
  const std::uint8_t* weights = tile + kHeader;
  if constexpr (Quads > 0) add_loose_quads(weights, tile_stride, x, row, acc);
  const std::ptrdiff_t ahead = R * tile_stride;
  for (int block = 0; block < w.blocks(); ++block) {
    for (int line = 64 * pass.number; line < kBlock; line += 64 * pass.count)
      for (int r = 0; r < R; ++r) prefetch(weights + r * tile_stride + ahead + line);
    add_byte_dot<Quads>(weights, tile_stride, values, stride, acc);
    weights += kBlock;
    values += kBlockCols;
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const F32x16 scales = load16(row_scales(tile + r * tile_stride));
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const F32x16 scale = mul(set1(x.header(row + t).scale), scales);
      store16(out + t * out_stride + r * kTileRows, mul(to_float(acc[r][t]), scale));
    }
  }
}

bool have_sums_of_two(const TokenRows& x, int row, int count) {
  for (int t = 0; t < count; ++t)
    if (x.header(row + t).loose.quads_per_sum < 2) return false;
  return true;
}

template <int R>
void byte_tiles(const PackedLinear& w, const TokenRows& x, int first_row, int last_row, int tile,
                float* out, std::ptrdiff_t out_stride) {
  Pass pass{0, ceil_div(last_row - first_row, kByteDotTokens)};
  // Rows are spread evenly over the passes: sixteen are eight and eight, not twelve and four.
  for (int row = first_row; row < last_row; ++pass.number) {
    const int rows = ceil_div(last_row - row, pass.count - pass.number);
    with_count<kByteDotTokens>(rows, [&]<int T>() {
      float* c = out + (row - first_row) * out_stride;
      if (kQuadsPerSum < 2 || have_sums_of_two(x, row, T))
        byte_kernel<kQuadsPerSum, T, R>(w, w.tile(tile), x, row, pass, c, out_stride);
      else
        byte_kernel<std::min(kQuadsPerSum, 1), T, R>(w, w.tile(tile), x, row, pass, c, out_stride);
    });
    row += rows;
  }
}

// The weights that rows' outliers meet: the columns that any of the rows has an outlier in, as
// codes in fp32.
struct OutlierPanel {
  std::int32_t* place;  // [cols]: a column's line in the panel, -1 if it has none
  float* codes;         // [columns][tiles * 16]
  int tiles;
};

// Tiles whose sums fit the registers together.
constexpr int kOutlierTiles = 4;

OutlierPanel gather(const PackedLinear& w, const TokenRows& x, int first_row, int last_row,
                    int first_tile, int last_tile, Scratch& scratch) {
  size_t most = 0;
  for (int row = first_row; row < last_row; ++row)
    most += static_cast<size_t>(x.header(row).outliers);
  const auto cols = static_cast<size_t>(w.cols);
  const int width = (last_tile - first_tile) * kTileRows;
  auto* place = scratch.get<std::int32_t>(cols + std::min(most, cols) * static_cast<size_t>(width));
  const OutlierPanel panel{place, reinterpret_cast<float*>(place + cols), last_tile - first_tile};
  std::fill_n(place, cols, -1);
  std::int32_t used = 0;
  for (int row = first_row; row < last_row; ++row)
    for (int i = 0; i < x.header(row).outliers; ++i) {
      const int col = x.outliers_of(row)[i].col;
      if (place[col] >= 0) continue;
      float* line = panel.codes + static_cast<std::ptrdiff_t>(used) * width;
      place[col] = used++;
      for (int tile = first_tile; tile < last_tile; ++tile, line += kTileRows) {
        const std::uint8_t* quad = w.tile(tile) + kHeader + col / 4 * 64;
        store16(line, sub(to_float(unsigned_byte(load_i32(quad), col % 4)), set1(128.0F)));
      }
    }
  return panel;
}

// One row's outliers times R tiles of the panel, added to out.
template <int R>
void outlier_kernel(const PackedLinear& w, const TokenRows& x, int row, const OutlierPanel& panel,
                    int first_tile, int tile, float* out) {
  const std::ptrdiff_t width = panel.tiles * kTileRows;
  const Outlier* outlier = x.outliers_of(row);
  const Outlier* end = outlier + x.header(row).outliers;
  F32x16 acc[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) acc[r] = zero();
  for (; outlier != end; ++outlier) {
    const float* codes = panel.codes + panel.place[outlier->col] * width + tile * kTileRows;
    const F32x16 value = set1(outlier->value);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r] = fma(load16(codes + r * kTileRows), value, acc[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    float* y = out + (tile + r) * kTileRows;
    const F32x16 scales = load16(row_scales(w.tile(first_tile + tile + r)));
    store16(y, add(load16(y), mul(acc[r], scales)));
  }
}

void add_outliers(const PackedLinear& w, const TokenRows& x, int first_row, int last_row,
                  int first_tile, int last_tile, float* out, std::ptrdiff_t out_stride,
                  Scratch& scratch) {
  const auto has_any = [&](int row) { return x.header(row).outliers > 0; };
  int first = first_row;
  while (first < last_row && !has_any(first)) ++first;
  if (first == last_row) return;
  const OutlierPanel panel = gather(w, x, first, last_row, first_tile, last_tile, scratch);
  for (int row = first; row < last_row; ++row) {
    if (!has_any(row)) continue;
    float* y = out + (row - first_row) * out_stride;
    for (int tile = 0; tile < panel.tiles; tile += kOutlierTiles)
      with_count<kOutlierTiles>(panel.tiles - tile, [&]<int R>() {
        outlier_kernel<R>(w, x, row, panel, first_tile, tile, y);
      });
  }
}

}  // namespace

void channel_product(const PackedLinear& w, const TokenRows& x, int first_row, int last_row,
                     int first_tile, int last_tile, float* out, std::ptrdiff_t out_stride,
                     Scratch& scratch) {
  // A few rows go at the pace of memory, and one stream of weights is read faster than two.
  const bool paired = last_row - first_row > kByteDotTokens / 2;
  for_each_tiles(first_tile, last_tile, paired, [&]<int R>(int tile) {
    float* c = out + static_cast<std::ptrdiff_t>(tile - first_tile) * kTileRows;
    byte_tiles<R>(w, x, first_row, last_row, tile, c, out_stride);
  });
  if (w.input.kind == InputKind::outliers)
    add_outliers(w, x, first_row, last_row, first_tile, last_tile, out, out_stride, scratch);
}

}  // namespace fuserve::FUSERVE_ISA
