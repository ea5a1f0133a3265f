// What a normalization is.
#pragma once

namespace fuserve {

enum class NormKind : int { rms = 0, layer = 1 };

struct Norm {
  NormKind kind = NormKind::rms;
  float eps = 0.0F;
  const float* weight = nullptr;  // [size]; null: this norm does not exist
  const float* bias = nullptr;    // [size]; null: none

  explicit operator bool() const { return weight != nullptr; }
};

}  // namespace fuserve
