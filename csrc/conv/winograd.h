// 3x3 convolution by products of transformed tiles.
#pragma once

#include "conv/conv_types.h"
#include "runtime/buffer.h"

namespace fuserve::FUSERVE_ISA {

void winograd_unit(const PackedConv& w, const ConvInput& input, const ConvEpilogue& epilogue,
                   const ConvUnit& unit, float* out, Scratch& scratch);

}  // namespace fuserve::FUSERVE_ISA
