// This instruction set's entries of the kernel table.
#include <algorithm>

#include "attention/append.h"
#include "attention/attention.h"
#include "conv/conv.h"
#include "decoder/fused_decoder.h"
#include "decoder/tree_sum.h"
#include "image/executor.h"
#include "linear/linear.h"
#include "linear/pack.h"
#include "linear/row_forms.h"
#include "machine/ceilings.h"
#include "norm/norm.h"
#include "runtime/kernels.h"

#define FUSERVE_STRING_(x) #x
#define FUSERVE_STRING(x) FUSERVE_STRING_(x)

namespace fuserve::FUSERVE_ISA {
namespace {

void pack(const LinearShape& shape, const PackSource& source, std::uint8_t* packed,
          ThreadPool& pool) {
  constexpr int kTilesAtOnce = 4;
  pool.run([&](Team& team, int thread) {
    team.for_each(thread, ceil_div(shape.tiles(), kTilesAtOnce), [&](int i) {
      pack_tiles(shape, source, i * kTilesAtOnce, std::min((i + 1) * kTilesAtOnce, shape.tiles()),
                 packed);
    });
  });
}

void linear(const PackedLinear& w, const float* x, int rows, float* out, ThreadPool& pool) {
  RowBuffer buffer;
  buffer.reserve(rows, w.cols);
  const MutableRows input = buffer.view(w.cols);
  const RowForms forms{&w};
  std::vector<Scratch> scratch(static_cast<size_t>(pool.size())), products(scratch.size());
  const int stride = w.tiles() * kTileRows;
  pool.run([&](Team& team, int thread) {
    team.for_each(thread, rows, [&](int row) {
      forms.make(x + static_cast<std::ptrdiff_t>(row) * w.cols, row, input);
    });
    team.sync(thread);
    // As in a decoder, sums are formed in a small buffer: rows of `out` can share a cache set.
    constexpr int kRows = 120, kTiles = 8, kCols = kTiles * kTileRows;
    const int units = ceil_div(w.tiles(), kTiles);
    auto& product = products[static_cast<size_t>(thread)];
    team.for_each(thread, ceil_div(rows, kRows) * units, [&](int unit) {
      const int first = unit / units * kRows, last = std::min(first + kRows, rows);
      const int tile = unit % units * kTiles, end = std::min(tile + kTiles, w.tiles());
      auto* sums = product.get<float>(static_cast<size_t>(kRows * kCols));
      linear_tiles(w, input.read_only(), first, last, tile, end, sums, kCols,
                   scratch[static_cast<size_t>(thread)]);
      for (int row = first; row < last; ++row)
        std::copy_n(sums + (row - first) * kCols, (end - tile) * kTileRows,
                    out + static_cast<std::ptrdiff_t>(row) * stride + tile * kTileRows);
    });
  });
}

void normalize_rows(const Norm& norm, const float* x, int rows, int size, float* out) {
  for (int row = 0; row < rows; ++row) {
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(row) * size;
    normalize(norm, x + at, size, out + at);
  }
}

void attention(const AttentionShape& shape, const KVCache& cache, AttentionTask task,
               const float* keys, const float* values, float* out) {
  const int padded = shape.padded_head_dim();
  for (int t = 0; t < task.tokens; ++t)
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      const int position = task.first_position + t;
      const int block = task.block_table[position / kBlockTokens];
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t * shape.num_kv_heads + head) * padded;
      append(cache, task.layer, block, head, position % kBlockTokens, keys + at, false);
      append(cache, task.layer, block, head, position % kBlockTokens, values + at, true);
    }
  Scratch scratch, memory;
  const int rows = task_rows(shape, task), heads = shape.num_kv_heads;
  const size_t floats = static_cast<size_t>(heads) * SoftmaxState::floats(rows, padded);
  const SoftmaxStates total{memory.get<float>(2 * floats), rows, padded};
  const SoftmaxStates part{total.memory + floats, rows, padded};
  task.first_kv_head = 0;
  task.num_kv_heads = heads;
  for (int h = 0; h < heads; ++h) total.of(h).clear(rows, padded);
  for (int split = task.first_split(); split < task.end_split(); ++split) {
    attend_split(shape, cache, task, split, part, scratch);
    for (int h = 0; h < heads; ++h) merge_split(rows, padded, part.of(h), total.of(h));
  }
  for (int h = 0; h < heads; ++h)
    finish_attention(shape, task, total.of(h), out + h * shape.heads_per_kv() * shape.head_dim,
                     shape.num_heads * shape.head_dim);
}

void add_parts(const float* const* parts, int count, int size, float* out) {
  tree_sum(parts, count, 0, size, [&](int k, int n, F32x16 sum) {
    if (n == 16)
      store16(out + k, sum);
    else
      store_n(out + k, sum, n);
  });
}

void convolve(const PackedConv& w, const ConvInput* inputs, const ConvEpilogue* epilogues,
              int batch, const ConvUnits& units, float* out, ThreadPool& pool) {
  std::vector<Scratch> scratch(static_cast<size_t>(pool.size()));
  const std::ptrdiff_t image_size =
      static_cast<std::ptrdiff_t>(units.out_height) * w.out_width(inputs->width) * w.out_channels;
  pool.run([&](Team& team, int thread) {
    team.for_each(thread, batch * units.per_image(), [&](int index) {
      const int image = index / units.per_image();
      conv_unit(w, inputs[image], epilogues[image], units.unit(index % units.per_image()),
                out + image * image_size, scratch[static_cast<size_t>(thread)]);
    });
  });
}

std::unique_ptr<Decoder> make_decoder(DecoderModel model, const KVCache& cache) {
  return std::make_unique<FusedDecoder>(std::move(model), cache);
}

std::unique_ptr<ImageExecutor> make_image_executor() {
  return std::make_unique<FusedImageExecutor>();
}

}  // namespace

const Kernels& kernel_table();
const Kernels& kernel_table() {
  static const Kernels table{FUSERVE_STRING(FUSERVE_ISA),
                             pack,
                             linear,
                             unpack_row,
                             normalize_rows,
                             attention,
                             add_parts,
                             convolve,
                             make_decoder,
                             make_image_executor,
                             read_bandwidth,
                             fp32_rate,
                             byte_dot_rate,
                             row_dot_rate};
  return table;
}

}  // namespace fuserve::FUSERVE_ISA
