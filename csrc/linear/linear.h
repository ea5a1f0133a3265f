// Matrix products with packed weights.
#pragma once

#include "linear/activations.h"
#include "linear/format.h"
#include "runtime/buffer.h"

namespace fuserve::FUSERVE_ISA {

// Computes tiles [first_tile, last_tile) of y = x W^T + bias for rows [first_row, last_row) of x:
// out[row - first_row][(tile - first_tile) * 16 + lane], with `out_stride` floats between rows.
//
// Every output is one sum in one fixed order (features ascending, a group at a time), whatever the
// number of rows and tiles, so results do not depend on batching, chunking or threads.
void linear_tiles(const PackedLinear& w, const Rows& x, int first_row, int last_row, int first_tile,
                  int last_tile, float* out, std::ptrdiff_t out_stride, Scratch& scratch);

// One row of the weight matrix in fp32 (an embedding).  out: [cols]
void unpack_row(const PackedLinear& w, int row, float* out);

}  // namespace fuserve::FUSERVE_ISA
