// Packing: convolution weights as a checkpoint has them into panels.
#pragma once

#include "conv/conv_types.h"
#include "linear/pack_source.h"
#include "runtime/team.h"

namespace fuserve {

// weights: [out channels, in channels, size, size], contiguous; packed: shape.packed_bytes()
void pack_conv(const ConvShape& shape, SourceType type, const void* weights, std::uint8_t* packed,
               ThreadPool& pool);

// The same for the int8 codes of an integer convolution.
void pack_conv_codes(const ConvShape& shape, const std::int8_t* codes, std::uint8_t* packed,
                     ThreadPool& pool);

}  // namespace fuserve
