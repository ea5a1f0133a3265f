// Products of int8 weights that have one scale a row with int8 activations that have one scale a
// token (W8A8), and with the outliers that stay fp32 (LLM.int8(), arXiv 2208.07339).
#pragma once

#include "linear/activations.h"
#include "linear/format.h"
#include "runtime/buffer.h"

namespace fuserve::FUSERVE_ISA {

// linear_tiles (linear.h) of a matrix that wants token rows. The sum over features is an exact
// int32; out = float(sum) * (token scale * row scale), then the outliers' products, summed by
// ascending column, and the bias are added. So a row's result is the same in any company.
void channel_tiles(const PackedLinear& w, const Rows& x, int first_row, int last_row,
                   int first_tile, int last_tile, float* out, std::ptrdiff_t out_stride,
                   Scratch& scratch);

}  // namespace fuserve::FUSERVE_ISA
