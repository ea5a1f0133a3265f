// Products of int8 weights that have one scale a row with int8 activations that have one scale a
// token (W8A8), and with the outliers that stay fp32 (LLM.int8(), arXiv 2208.07339).
#pragma once

#include "linear/format.h"
#include "linear/token_rows.h"
#include "runtime/buffer.h"

namespace fuserve::FUSERVE_ISA {

// As linear_tiles, without the bias. The sum over features is an exact int32; out = float(sum) *
// (token scale * row scale), to which the outliers' products are added, summed by ascending column.
// So a row's result is the same in any company.
void channel_product(const PackedLinear& w, const TokenRows& x, int first_row, int last_row,
                     int first_tile, int last_tile, float* out, std::ptrdiff_t out_stride,
                     Scratch& scratch);

}  // namespace fuserve::FUSERVE_ISA
