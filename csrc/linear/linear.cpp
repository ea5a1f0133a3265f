#include "linear/linear.h"

#include <algorithm>
#include <cstring>

#include "linear/channel_linear.h"
#include "linear/unpack.h"
#include "linear/with_count.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// Features of a panel that is unpacked to fp32: 16 rows x 256 features are 16 KiB, half of an L1
// data cache.
constexpr int kPanelCols = 256;

constexpr int level_of(int blocks_per_group) {
  return blocks_per_group == 1 ? 0 : blocks_per_group == 2 ? 1 : 2;
}

// Blocks that all rows go through before the next ones: their weights stay in the first-level
// cache, while the blocks after them are fetched.
constexpr int kChunkBlocks = 32;

// What is fetched from memory while a kernel runs: weights `ahead` bytes further on. The passes
// over the rows share the work, so that memory is read all the time that arithmetic is done.
struct Fetch {
  std::ptrdiff_t ahead;
  int pass;
  int passes;
};

// Blocks [first, last) of a tile, cut at groups.
struct BlockRange {
  int first;
  int last;
};

// T rows of x times the blocks of R tiles, int8 activations, added to what stands in out.
template <int T, int R, WeightFormat F>
void integer_kernel(const PackedLinear& w, const std::uint8_t* tile, BlockRange range,
                    const std::int8_t* record, const QuantizedLayout& layout, Fetch fetch,
                    float* out, std::ptrdiff_t out_stride) {
  const auto stride = static_cast<std::ptrdiff_t>(layout.stride());
  const auto tile_stride = static_cast<std::ptrdiff_t>(w.tile_bytes());
  const int per_group = w.blocks_per_group();
  const float* scales = scales_of(record, layout);
  const float* offsets = offsets_of(record, layout, level_of(per_group));
  const auto float_stride = stride / 4;
  F32x16 acc[R][T];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      acc[r][t] = range.first == 0 ? zero() : load16(out + t * out_stride + r * kTileRows);

  int block = range.first;
  tile += w.block_offset(block);
  for (int group = block / per_group; block < range.last; ++group) {
    const std::uint8_t* header = tile;
    tile += header_bytes(F);
    F32x16 partial[R][T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const F32x16 start = F == WeightFormat::q4 ? set1(offsets[t * float_stride + group]) : zero();
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) partial[r][t] = start;
    }
    const int group_end = std::min(block + per_group, range.last);
    for (; block < group_end; ++block) {
      I32x16 dot[R][T];
      const std::int8_t* x = record + block * kBlockCols;
      for (int line = 64 * fetch.pass; line < block_bytes(F); line += 64 * fetch.passes)
        for (int r = 0; r < R; ++r) prefetch(tile + r * tile_stride + fetch.ahead + line);
      if constexpr (is_q4(F))
        dot_q4<T, R>(tile, tile_stride, x, stride, dot);
      else
        dot_q8<T, R>(reinterpret_cast<const std::int8_t*>(tile), tile_stride, x, stride, dot);
      tile += block_bytes(F);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const F32x16 scale = set1(scales[t * float_stride + block]);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) partial[r][t] = fma(to_float(dot[r][t]), scale, partial[r][t]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto* halves = reinterpret_cast<const Half*>(header + r * tile_stride);
      const F32x16 scale = load16(halves);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) acc[r][t] = fma(partial[r][t], scale, acc[r][t]);
      if constexpr (F == WeightFormat::q4_asymmetric) {
        // Offsets are -8 times the sums that minimums want.
        const F32x16 minimum = mul(load16(halves + kTileRows), set1(-0.125F));
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t)
          acc[r][t] = fma(minimum, set1(offsets[t * float_stride + group]), acc[r][t]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) store16(out + t * out_stride + r * kTileRows, acc[r][t]);
}

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

template <int R, WeightFormat F>
void integer_tiles(const PackedLinear& w, const Rows& x, int first_row, int last_row, int tile,
                   float* out, std::ptrdiff_t out_stride) {
  const int passes = ceil_div(last_row - first_row, kIntegerTokens);
  // One scale for all features leaves no place to cut, a single pass no reason to.
  const bool whole = passes == 1 || w.group == 0;
  const int chunk = whole ? w.blocks() : kChunkBlocks;
  Fetch fetch{whole ? R * static_cast<std::ptrdiff_t>(w.tile_bytes()) : w.block_offset(chunk), 0,
              passes};
  for (int block = 0; block < w.blocks(); block += chunk) {
    const BlockRange range{block, std::min(block + chunk, w.blocks())};
    fetch.pass = 0;
    for (int row = first_row; row < last_row; row += kIntegerTokens, ++fetch.pass)
      with_count<kIntegerTokens>(last_row - row, [&]<int T>() {
        integer_kernel<T, R, F>(w, w.tile(tile), range, x.record(row), x.layout, fetch,
                                out + (row - first_row) * out_stride, out_stride);
      });
  }
}

template <int R>
void integer_tiles(const PackedLinear& w, const Rows& x, int first_row, int last_row, int tile,
                   float* out, std::ptrdiff_t out_stride) {
  if (w.format == WeightFormat::q8)
    integer_tiles<R, WeightFormat::q8>(w, x, first_row, last_row, tile, out, out_stride);
  else if (w.format == WeightFormat::q4)
    integer_tiles<R, WeightFormat::q4>(w, x, first_row, last_row, tile, out, out_stride);
  else
    integer_tiles<R, WeightFormat::q4_asymmetric>(w, x, first_row, last_row, tile, out, out_stride);
}

template <int R>
void float_tiles(const PackedLinear& w, const Rows& x, int first_row, int last_row, int tile,
                 float* out, std::ptrdiff_t out_stride, Scratch& scratch) {
  const std::uint8_t* data = w.tile(tile);
  const bool few_rows = last_row - first_row <= kFloatTokens;
  for (int col = 0; col < w.cols; col += kPanelCols) {
    const int cols = std::min(kPanelCols, w.cols - col);
    const auto run = [&](const auto* panel, std::ptrdiff_t panel_stride) {
      for (int row = first_row; row < last_row; row += kFloatTokens)
        with_count<kFloatTokens>(last_row - row, [&]<int T>() {
          float_kernel<T, R>(panel, panel_stride, cols, x.value_row(row) + col, x.value_stride,
                             col == 0, out + (row - first_row) * out_stride, out_stride);
        });
    };
    const auto run_packed = [&](const auto* values) {
      run(values + static_cast<std::ptrdiff_t>(col) * kTileRows,
          static_cast<std::ptrdiff_t>(w.cols) * kTileRows);
    };
    if (w.format == WeightFormat::f32) {
      run_packed(reinterpret_cast<const float*>(data));
    } else if (few_rows && w.format == WeightFormat::f16) {
      run_packed(reinterpret_cast<const Half*>(data));
    } else if (few_rows && w.format == WeightFormat::bf16) {
      run_packed(reinterpret_cast<const BFloat*>(data));
    } else {
      // Widened once, the panels serve all rows.
      constexpr std::ptrdiff_t kPanel = kPanelCols * kTileRows;
      auto* panels = scratch.get<float>(static_cast<size_t>(R * kPanel));
      for (int r = 0; r < R; ++r) unpack_panel(w, tile + r, col, cols, panels + r * kPanel);
      run(static_cast<const float*>(panels), kPanel);
    }
  }
}

template <int R>
void tiles_at_once(const PackedLinear& w, const Rows& x, int first_row, int last_row, int tile,
                   float* out, std::ptrdiff_t out_stride, Scratch& scratch) {
  if (w.wants_quantized_input())
    integer_tiles<R>(w, x, first_row, last_row, tile, out, out_stride);
  else
    float_tiles<R>(w, x, first_row, last_row, tile, out, out_stride, scratch);
  if (w.bias == nullptr) return;
  for (int r = 0; r < R; ++r) {
    const F32x16 bias = load16(w.bias + static_cast<std::ptrdiff_t>(tile + r) * kTileRows);
    float* c = out + r * kTileRows;
    for (int row = 0; row < last_row - first_row; ++row)
      store16(c + row * out_stride, add(load16(c + row * out_stride), bias));
  }
}

}  // namespace

void linear_tiles(const PackedLinear& w, const Rows& x, int first_row, int last_row, int first_tile,
                  int last_tile, float* out, std::ptrdiff_t out_stride, Scratch& scratch) {
  if (w.wants_token_rows())
    return channel_tiles(w, x, first_row, last_row, first_tile, last_tile, out, out_stride,
                         scratch);
  for (int tile = first_tile; tile < last_tile;) {
    float* c = out + static_cast<std::ptrdiff_t>(tile - first_tile) * kTileRows;
    // A few rows go at the pace of memory, and one stream of weights is read faster than two.
    if (last_row - first_row > kIntegerTokens && tile + kTilesAtOnce <= last_tile) {
      tiles_at_once<kTilesAtOnce>(w, x, first_row, last_row, tile, c, out_stride, scratch);
      tile += kTilesAtOnce;
    } else {
      tiles_at_once<1>(w, x, first_row, last_row, tile, c, out_stride, scratch);
      ++tile;
    }
  }
}

void unpack_row(const PackedLinear& w, int row, float* out) {
  const int in_group = row % w.rows_per_group();
  const int tile = row / w.rows_per_group() * w.tiles_per_group() + in_group / kTileRows;
  unpack_lane(w, tile, in_group % kTileRows, out);
}

}  // namespace fuserve::FUSERVE_ISA
