#include "conv/conv.h"

#include "conv/direct.h"
#include "conv/integer.h"
#include "conv/winograd.h"

namespace fuserve::FUSERVE_ISA {

void conv_unit(const PackedConv& w, const ConvInput& input, const ConvEpilogue& epilogue,
               const ConvUnit& unit, float* out, Scratch& scratch) {
  if (w.is_winograd())
    winograd_unit(w, input, epilogue, unit, out, scratch);
  else if (w.is_integer())
    integer_unit(w, input, epilogue, unit, out, scratch);
  else
    direct_unit(w, input, epilogue, unit, out, scratch);
}

}  // namespace fuserve::FUSERVE_ISA
