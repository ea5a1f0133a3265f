// Convolution by the definition, in int8: every product is exact, so are their sums in int32.
#pragma once

#include "conv/conv_types.h"
#include "runtime/buffer.h"

namespace fuserve::FUSERVE_ISA {

// A NaN or infinity in the input reaches the outputs that see it as NaN.
void integer_unit(const PackedConv& w, const ConvInput& input, const ConvEpilogue& epilogue,
                  const ConvUnit& unit, float* out, Scratch& scratch);

}  // namespace fuserve::FUSERVE_ISA
