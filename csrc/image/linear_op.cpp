#include <algorithm>

#include "image/activation.h"
#include "image/executor.h"
#include "linear/linear.h"
#include "linear/row_forms.h"
#include "linear/units.h"
#include "norm/norm.h"

namespace fuserve::FUSERVE_ISA {

bool FusedImageExecutor::wants_prepared(const LinearOp& op) const {
  const PackedLinear& w = op.weights;
  return op.norm || w.wants_token_rows() || w.wants_quantized_input() || w.input.is_transformed() ||
         value(op.source).batch != value(op.out).batch || value(op.source).above > 0 ||
         value(op.source).below > 0;
}

Rows FusedImageExecutor::prepare(Lane& lane, const LinearOp& op) {
  const ImageValue& shape = value(op.out);
  const Operand source = operand(op.source, shape.batch);
  const int cols = op.weights.cols;
  Rows rows;
  if (!wants_prepared(op)) {
    rows.values = source.data;
    rows.value_stride = cols;
    rows.layout.cols = cols;
    return rows;
  }
  const MutableRows out = rows_.view(cols);
  const RowForms forms({&op.weights});
  lane.team.for_each(lane.thread, shape.batch * shape.pixels(), [&](int i) {
    const float* row = source.row(i);
    if (op.norm) {
      normalize(op.norm, row, cols, out.value_row(i));
      row = out.value_row(i);
    }
    forms.make(row, i, out);
  });
  lane.team.sync(lane.thread);
  return out.read_only();
}

void FusedImageExecutor::perform(Lane& lane, const LinearOp& op) {
  const Rows input = prepare(lane, op);
  const ImageValue& shape = value(op.out);
  const Operand out = operand(op.out, shape.batch);
  const PackedLinear& w = op.weights;
  const bool gated = op.activation == LinearActivation::geglu;
  const int rows = shape.batch * shape.pixels(), tiles = gated ? w.tiles() / 2 : w.tiles();
  const int block = rows_per_unit(w, input, rows), per_unit = tiles_per_unit(w, lane.team.size());
  const int units = ceil_div(tiles, per_unit);
  lane.team.for_each(lane.thread, ceil_div(rows, block) * units, [&](int unit) {
    const int first = unit / units * block, last = std::min(first + block, rows);
    const int tile = unit % units * per_unit, last_tile = std::min(tile + per_unit, tiles);
    const int cols = (last_tile - tile) * kTileRows;
    auto* product = lane.memory.product.get<float>(static_cast<size_t>(2 * block * cols));
    linear_tiles(w, input, first, last, tile, last_tile, product, cols, lane.memory.linear);
    if (gated)
      linear_tiles(w, input, first, last, tile + tiles, last_tile + tiles, product + block * cols,
                   cols, lane.memory.linear);
    finish_rows(op, out, first, last, tile, last_tile, product, product + block * cols);
  });
}

// The epilogue of rows [first, last) and tiles [tile, last_tile).
void FusedImageExecutor::finish_rows(const LinearOp& op, const Operand& out, int first, int last,
                                     int tile, int last_tile, const float* product,
                                     const float* gates) const {
  const PackedLinear& w = op.weights;
  const int stride = (last_tile - tile) * kTileRows;
  const bool gated = op.activation == LinearActivation::geglu;
  const Operand residual =
      op.residual == kNoValue ? Operand{} : operand(op.residual, out.shape->batch);
  for (int row = first; row < last; ++row) {
    float* target = out.row(row);
    const float* added = residual.data == nullptr ? nullptr : residual.row(row);
    for (int t = tile; t < last_tile; ++t) {
      const int in_group = t % w.tiles_per_group() * kTileRows;
      const int col = t / w.tiles_per_group() * w.rows_per_group() + in_group;
      const int n = std::min(kTileRows, w.rows_per_group() - in_group);
      const std::ptrdiff_t at =
          static_cast<std::ptrdiff_t>(row - first) * stride + (t - tile) * kTileRows;
      const auto sum = [&](const float* values, int channel) {
        const F32x16 v = load16(values + at);
        if (added == nullptr) return v;
        return add(v, n == 16 ? load16(added + channel) : load_n(added + channel, n));
      };
      const F32x16 v = sum(product, col);
      const F32x16 x =
          gated ? mul(v, gelu(sum(gates, col + w.rows_per_group()))) : activate(op.activation, v);
      n == 16 ? store16(target + col, x) : store_n(target + col, x, n);
    }
  }
}

}  // namespace fuserve::FUSERVE_ISA
