// Convolutions over NHWC images.
#pragma once

#include "conv/conv_types.h"
#include "runtime/buffer.h"

namespace fuserve::FUSERVE_ISA {

// Computes one unit of out, an image [out height, out width, out channels].
//
// Every output is one sum in one fixed order (blocks of channels, taps, channels), whatever the
// unit, so results do not depend on batch, bands or threads.
void conv_unit(const PackedConv& w, const ConvInput& input, const ConvEpilogue& epilogue,
               const ConvUnit& unit, float* out, Scratch& scratch);

}  // namespace fuserve::FUSERVE_ISA
