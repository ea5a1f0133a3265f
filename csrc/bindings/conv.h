// Packed convolutions as Python holds them.
#pragma once

#include "bindings/bindings.h"
#include "conv/conv_types.h"

namespace fuserve::bindings {

struct ConvHandle {
  PackedConv weights;
  nb::object data, bias, scales, multiplier;
};

}  // namespace fuserve::bindings
