// Packing: weights as a checkpoint has them into tiles, quantized to nearest on the way if asked.
#pragma once

#include <cstdint>

#include "linear/format.h"
#include "linear/pack_source.h"

namespace fuserve::FUSERVE_ISA {

// Packs tiles [first, last) to where they belong in `packed`, the start of the whole matrix.
void pack_tiles(const LinearShape& shape, const PackSource& source, int first, int last,
                std::uint8_t* packed);

}  // namespace fuserve::FUSERVE_ISA
