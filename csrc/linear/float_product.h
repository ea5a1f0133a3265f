// Products in fp32, of weights in any format.
#pragma once

#include "linear/activations.h"
#include "linear/format.h"
#include "runtime/buffer.h"

namespace fuserve::FUSERVE_ISA {

// As linear_tiles, without the bias.
void float_product(const PackedLinear& w, const Rows& x, int first_row, int last_row,
                   int first_tile, int last_tile, float* out, std::ptrdiff_t out_stride,
                   Scratch& scratch);

}  // namespace fuserve::FUSERVE_ISA
