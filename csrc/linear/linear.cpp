#include "linear/linear.h"

#include <algorithm>
#include <cstring>

#include "linear/channel_product.h"
#include "linear/float_product.h"
#include "linear/tiles.h"
#include "linear/unpack.h"

namespace fuserve::FUSERVE_ISA {
namespace {

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

// T rows of x times the blocks of R tiles, int8 activations, added to what stands in out. Groups of
// G blocks; 0: as many as w says.
template <int T, int R, WeightFormat F, int G>
void integer_kernel(const PackedLinear& w, const std::uint8_t* tile, BlockRange range,
                    const std::int8_t* record, const QuantizedLayout& layout, Fetch fetch,
                    float* out, std::ptrdiff_t out_stride) {
  const auto stride = static_cast<std::ptrdiff_t>(layout.stride());
  const auto tile_stride = static_cast<std::ptrdiff_t>(w.tile_bytes());
  const int per_group = G ? G : w.blocks_per_group();
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
    const int group_end = G == 1 ? block + 1 : std::min(block + per_group, range.last);
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

template <int R, WeightFormat F, int G>
void integer_tiles(const PackedLinear& w, const Rows& x, int first_row, int last_row, int tile,
                   float* out, std::ptrdiff_t out_stride) {
  const int passes = ceil_div(last_row - first_row, kIntegerTokens);
  // One scale for all features leaves no place to cut, a single pass no reason to.
  const bool whole = passes == 1 || w.groups() == 1;
  const int chunk = whole ? w.blocks() : kChunkBlocks;
  Fetch fetch{whole ? R * static_cast<std::ptrdiff_t>(w.tile_bytes()) : w.block_offset(chunk), 0,
              passes};
  for (int block = 0; block < w.blocks(); block += chunk) {
    const BlockRange range{block, std::min(block + chunk, w.blocks())};
    int row = first_row;
    for (fetch.pass = 0; fetch.pass < passes; ++fetch.pass)
      with_count<kIntegerTokens>(ceil_div(last_row - row, passes - fetch.pass), [&]<int T>() {
        integer_kernel<T, R, F, G>(w, w.tile(tile), range, x.record(row), x.layout, fetch,
                                   out + (row - first_row) * out_stride, out_stride);
        row += T;
      });
  }
}

template <int R, WeightFormat F>
void integer_tiles(const PackedLinear& w, const Rows& x, int first_row, int last_row, int tile,
                   float* out, std::ptrdiff_t out_stride) {
  if (w.blocks_per_group() == 1)
    integer_tiles<R, F, 1>(w, x, first_row, last_row, tile, out, out_stride);
  else
    integer_tiles<R, F, 0>(w, x, first_row, last_row, tile, out, out_stride);
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

void integer_product(const PackedLinear& w, const Rows& x, int first_row, int last_row,
                     int first_tile, int last_tile, float* out, std::ptrdiff_t out_stride) {
  // A few rows go at the pace of memory, and one stream of weights is read faster than two.
  const bool paired = last_row - first_row > kIntegerTokens;
  for_each_tiles(first_tile, last_tile, paired, [&]<int R>(int tile) {
    float* c = out + static_cast<std::ptrdiff_t>(tile - first_tile) * kTileRows;
    integer_tiles<R>(w, x, first_row, last_row, tile, c, out_stride);
  });
}

}  // namespace

void linear_tiles(const PackedLinear& w, const Rows& x, int first_row, int last_row, int first_tile,
                  int last_tile, float* out, std::ptrdiff_t out_stride, Scratch& scratch) {
  if (w.wants_token_rows())
    channel_product(w, x.tokens, first_row, last_row, first_tile, last_tile, out, out_stride,
                    scratch);
  else if (w.wants_quantized_input())
    integer_product(w, x, first_row, last_row, first_tile, last_tile, out, out_stride);
  else
    float_product(w, x, first_row, last_row, first_tile, last_tile, out, out_stride, scratch);
  if (w.bias == nullptr) return;
  for (int row = 0; row < last_row - first_row; ++row) {
    for (int tile = first_tile; tile < last_tile; ++tile) {
      float* c =
          out + row * out_stride + static_cast<std::ptrdiff_t>(tile - first_tile) * kTileRows;
      store16(c, add(load16(c), load16(w.bias + static_cast<std::ptrdiff_t>(tile) * kTileRows)));
    }
  }
}

void unpack_row(const PackedLinear& w, int row, float* out) {
  const int in_group = row % w.rows_per_group();
  const int tile = row / w.rows_per_group() * w.tiles_per_group() + in_group / kTileRows;
  unpack_lane(w, tile, in_group % kTileRows, out);
}

}  // namespace fuserve::FUSERVE_ISA
