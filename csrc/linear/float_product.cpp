#include "linear/float_product.h"

#include <algorithm>

#include "linear/tiles.h"
#include "linear/unpack.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// Features of a panel: 16 rows x 256 features are 16 KiB in fp32, half of an L1 data cache.
constexpr int kPanelCols = 256;

// T rows of x times `cols` features of R panels [cols][16], added to what stands in out.
template <int T, int R, class W>
void float_kernel(const W* panel, std::ptrdiff_t panel_stride, int cols, const float* x,
                  std::ptrdiff_t x_stride, bool first, float* out, std::ptrdiff_t out_stride) {
  F32x16 acc[R][T];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      acc[r][t] = first ? zero() : load16(out + t * out_stride + r * kTileRows);
  for (int k = 0; k < cols; ++k) {
    F32x16 weights[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      weights[r] = load16(panel + r * panel_stride + static_cast<std::ptrdiff_t>(k) * kTileRows);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const F32x16 value = set1(x[t * x_stride + k]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][t] = fma(weights[r], value, acc[r][t]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) store16(out + t * out_stride + r * kTileRows, acc[r][t]);
}

struct FloatProduct {
  const PackedLinear& w;
  const Rows& x;
  int first_row;
  int last_row;
  int first_tile;
  int last_tile;
  float* out;  // [rows, out_stride], zero features so far
  std::ptrdiff_t out_stride;
  Scratch& scratch;

  int rows() const { return last_row - first_row; }
  bool few_rows() const { return rows() <= kFloatTokens; }

  void run() const;
  template <int R>
  void panels(int tile, int col) const;
  template <int R, class W>
  void passes(int tile, int col, const W* panel, std::ptrdiff_t panel_stride, const W* next) const;
};

void FloatProduct::run() const {
  // Few rows read the weights in the order of memory. Many go through all tiles with the features
  // of one panel, which stay in the second-level cache meanwhile.
  const int chunk = few_rows() ? w.cols : kPanelCols;
  for (int begin = 0; begin < w.cols; begin += chunk) {
    const int end = std::min(begin + chunk, w.cols);
    for_each_tiles(first_tile, last_tile, !few_rows(), [&]<int R>(int tile) {
      for (int col = begin; col < end; col += kPanelCols) panels<R>(tile, col);
    });
  }
}

// The features of one panel, of R tiles, times all rows, added to what stands in out.
template <int R>
void FloatProduct::panels(int tile, int col) const {
  const std::uint8_t* data = w.tile(tile);
  const auto packed = [&](const auto* values) {
    const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(w.cols) * kTileRows;
    values += static_cast<std::ptrdiff_t>(col) * kTileRows;
    passes<R>(tile, col, values, stride, few_rows() ? nullptr : values + R * stride);
  };
  if (w.format == WeightFormat::f32) {
    packed(reinterpret_cast<const float*>(data));
  } else if (few_rows() && w.format == WeightFormat::f16) {
    packed(reinterpret_cast<const Half*>(data));
  } else if (few_rows() && w.format == WeightFormat::bf16) {
    packed(reinterpret_cast<const BFloat*>(data));
  } else {
    // Widened once, the panels serve all rows from the first-level cache.
    constexpr std::ptrdiff_t kPanel = kPanelCols * kTileRows;
    auto* widened = scratch.get<float>(static_cast<size_t>(R * kPanel));
    for (int r = 0; r < R; ++r)
      unpack_panel(w, tile + r, col, std::min(kPanelCols, w.cols - col), widened + r * kPanel);
    passes<R, float>(tile, col, widened, kPanel, nullptr);
  }
}

// next: the panels that are wanted after these, fetched by and by; null: none
template <int R, class W>
void FloatProduct::passes(int tile, int col, const W* panel, std::ptrdiff_t panel_stride,
                          const W* next) const {
  const int cols = std::min(kPanelCols, w.cols - col);
  const int panel_lines = next == nullptr ? 0 : cols * kTileRows * static_cast<int>(sizeof(W)) / 64;
  const int lines = ceil_div(panel_lines, ceil_div(rows(), kFloatTokens));
  float* sums = out + static_cast<std::ptrdiff_t>(tile - first_tile) * kTileRows;
  for (int row = first_row; row < last_row; row += kFloatTokens) {
    for (int line = 0; line < lines; ++line, next += 64 / sizeof(W))
      for (int r = 0; r < R; ++r) prefetch(next + r * panel_stride);
    with_count<kFloatTokens>(last_row - row, [&]<int T>() {
      float_kernel<T, R>(panel, panel_stride, cols, x.value_row(row) + col, x.value_stride,
                         col == 0, sums + (row - first_row) * out_stride, out_stride);
    });
  }
}

}  // namespace

void float_product(const PackedLinear& w, const Rows& x, int first_row, int last_row,
                   int first_tile, int last_tile, float* out, std::ptrdiff_t out_stride,
                   Scratch& scratch) {
  FloatProduct{w, x, first_row, last_row, first_tile, last_tile, out, out_stride, scratch}.run();
}

}  // namespace fuserve::FUSERVE_ISA
