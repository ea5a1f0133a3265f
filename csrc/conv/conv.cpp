#include "conv/conv.h"

#include "conv/direct.h"

namespace fuserve::FUSERVE_ISA {

void conv_unit(const PackedConv& w, const ConvInput& input, const ConvEpilogue& epilogue,
               const ConvUnit& unit, float* out, Scratch& scratch) {
  direct_unit(w, input, epilogue, unit, out, scratch);
}

}  // namespace fuserve::FUSERVE_ISA
