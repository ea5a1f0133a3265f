// Packed weights as Python holds them: the native view and the arrays that keep its memory alive.
#pragma once

#include "bindings/bindings.h"
#include "linear/format.h"
#include "norm/norm_types.h"

namespace fuserve::bindings {

struct LinearHandle {
  PackedLinear weights;
  nb::object data, bias, shift, multiplier;
};

struct NormHandle {
  Norm norm;
  nb::object weight, bias;
};

}  // namespace fuserve::bindings
