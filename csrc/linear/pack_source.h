// Weights as a checkpoint has them, on their way to the packed layout.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fuserve {

enum class SourceType : int { f32 = 0, f16 = 1, bf16 = 2, codes = 3 };

// A weight matrix [rows, cols]. Codes are the values of the target format itself (int8 for q8,
// 0 to 15 for q4) with the scales and, for asymmetric q4, minimums of its groups.
struct PackSource {
  SourceType type = SourceType::f32;
  const void* data = nullptr;
  std::ptrdiff_t row_stride = 0;    // elements
  const float* scales = nullptr;    // [rows, groups]
  const float* minimums = nullptr;  // [rows, groups]
};

}  // namespace fuserve
