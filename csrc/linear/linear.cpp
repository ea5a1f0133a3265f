#include "linear/linear.h"

#include <algorithm>
#include <cstring>

#include "linear/unpack.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// Features of a panel that is unpacked to fp32: 16 rows x 256 features are 16 KiB, half of an L1
// data cache.
constexpr int kPanelCols = 256;

constexpr int level_of(int blocks_per_group) {
  return blocks_per_group == 1 ? 0 : blocks_per_group == 2 ? 1 : 2;
}

// T rows of x times one tile, int8 activations.
template <int T, WeightFormat F>
void integer_kernel(const PackedLinear& w, const std::uint8_t* tile, const std::int8_t* record,
                    const QuantizedLayout& layout, float* out, std::ptrdiff_t out_stride) {
  const auto stride = static_cast<std::ptrdiff_t>(layout.stride());
  const int blocks = w.blocks(), per_group = w.blocks_per_group();
  const float* scales = scales_of(record, layout);
  const float* sums = sums_of(record, layout, level_of(per_group));
  const auto float_stride = stride / 4;
  F32x16 acc[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) acc[t] = zero();

  for (int group = 0, block = 0; block < blocks; ++group) {
    const auto* header = reinterpret_cast<const Half*>(tile);
    tile += header_bytes(F);
    F32x16 partial[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      partial[t] = F == WeightFormat::q4 ? set1(-8.0F * sums[t * float_stride + group]) : zero();
    const int group_end = std::min(block + per_group, blocks);
    for (; block < group_end; ++block) {
      I32x16 dot[T];
      const std::int8_t* x = record + block * kBlockCols;
      prefetch(tile + 1024);
      if constexpr (is_q4(F))
        dot_q4<T>(tile, x, stride, dot);
      else
        dot_q8<T>(reinterpret_cast<const std::int8_t*>(tile), x, stride, dot);
      tile += block_bytes(F);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t)
        partial[t] = fma(to_float(dot[t]), set1(scales[t * float_stride + block]), partial[t]);
    }
    const F32x16 scale = load16(header);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) acc[t] = fma(partial[t], scale, acc[t]);
    if constexpr (F == WeightFormat::q4_asymmetric) {
      const F32x16 minimum = load16(header + kTileRows);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t)
        acc[t] = fma(minimum, set1(sums[t * float_stride + group]), acc[t]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) store16(out + t * out_stride, acc[t]);
}

// T rows of x times `cols` features of a panel [cols][16], added to what stands in out.
template <int T, class W>
void float_kernel(const W* panel, int cols, const float* x, std::ptrdiff_t x_stride, bool first,
                  float* out, std::ptrdiff_t out_stride) {
  F32x16 acc[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) acc[t] = first ? zero() : load16(out + t * out_stride);
  for (int k = 0; k < cols; ++k) {
    const F32x16 weights = load16(panel + static_cast<std::ptrdiff_t>(k) * kTileRows);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) acc[t] = fma(weights, set1(x[t * x_stride + k]), acc[t]);
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) store16(out + t * out_stride, acc[t]);
}

// Calls f with `count`, at most Max, as a compile-time constant.
template <int Max, class F>
void with_count(int count, F&& f) {
  if constexpr (Max > 1) {
    if (count < Max) return with_count<Max - 1>(count, f);
  }
  f.template operator()<Max>();
}

template <WeightFormat F>
void integer_tile(const PackedLinear& w, const Rows& x, int first_row, int last_row, int tile,
                  float* out, std::ptrdiff_t out_stride) {
  for (int row = first_row; row < last_row; row += kIntegerTokens)
    with_count<kIntegerTokens>(last_row - row, [&]<int T>() {
      integer_kernel<T, F>(w, w.tile(tile), x.record(row), x.layout,
                           out + (row - first_row) * out_stride, out_stride);
    });
}

template <class W>
void float_panel(const W* panel, int cols, const Rows& x, int first_row, int last_row,
                 int first_col, float* out, std::ptrdiff_t out_stride) {
  for (int row = first_row; row < last_row; row += kFloatTokens)
    with_count<kFloatTokens>(last_row - row, [&]<int T>() {
      float_kernel<T>(panel, cols, x.value_row(row) + first_col, x.value_stride, first_col == 0,
                      out + (row - first_row) * out_stride, out_stride);
    });
}

void float_tile(const PackedLinear& w, const Rows& x, int first_row, int last_row, int tile,
                float* out, std::ptrdiff_t out_stride, Scratch& scratch) {
  const std::uint8_t* data = w.tile(tile);
  const bool few_rows = last_row - first_row <= kFloatTokens;
  for (int col = 0; col < w.cols; col += kPanelCols) {
    const int cols = std::min(kPanelCols, w.cols - col);
    const auto at = static_cast<std::ptrdiff_t>(col) * kTileRows;
    const auto run = [&](const auto* panel) {
      float_panel(panel, cols, x, first_row, last_row, col, out, out_stride);
    };
    if (w.format == WeightFormat::f32) {
      run(reinterpret_cast<const float*>(data) + at);
    } else if (few_rows && w.format == WeightFormat::f16) {
      run(reinterpret_cast<const Half*>(data) + at);
    } else if (few_rows && w.format == WeightFormat::bf16) {
      run(reinterpret_cast<const BFloat*>(data) + at);
    } else {
      // Widened once, the panel serves all rows.
      auto* panel = scratch.get<float>(kPanelCols * kTileRows);
      unpack_panel(w, tile, col, cols, panel);
      run(static_cast<const float*>(panel));
    }
  }
}

}  // namespace

void linear_tiles(const PackedLinear& w, const Rows& x, int first_row, int last_row, int first_tile,
                  int last_tile, float* out, std::ptrdiff_t out_stride, Scratch& scratch) {
  for (int tile = first_tile; tile < last_tile; ++tile) {
    float* c = out + static_cast<std::ptrdiff_t>(tile - first_tile) * kTileRows;
    if (!w.wants_quantized_input())
      float_tile(w, x, first_row, last_row, tile, c, out_stride, scratch);
    else if (w.format == WeightFormat::q8)
      integer_tile<WeightFormat::q8>(w, x, first_row, last_row, tile, c, out_stride);
    else if (w.format == WeightFormat::q4)
      integer_tile<WeightFormat::q4>(w, x, first_row, last_row, tile, c, out_stride);
    else
      integer_tile<WeightFormat::q4_asymmetric>(w, x, first_row, last_row, tile, c, out_stride);
    if (w.bias == nullptr) continue;
    const F32x16 bias = load16(w.bias + static_cast<std::ptrdiff_t>(tile) * kTileRows);
    for (int row = 0; row < last_row - first_row; ++row)
      store16(c + row * out_stride, add(load16(c + row * out_stride), bias));
  }
}

void unpack_row(const PackedLinear& w, int row, float* out) {
  const int in_group = row % w.rows_per_group();
  const int tile = row / w.rows_per_group() * w.tiles_per_group() + in_group / kTileRows;
  unpack_lane(w, tile, in_group % kTileRows, out);
}

}  // namespace fuserve::FUSERVE_ISA
