// What becomes of a product's sums.
#pragma once

#include <algorithm>

#include "conv/conv_types.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// Finishes 16 output channels of pixels of one image.
class Finisher {
 public:
  Finisher(const PackedConv& w, const ConvEpilogue& epilogue, int tile, float* out)
      : epilogue_(epilogue),
        channels_(w.out_channels),
        first_(tile * kTileRows),
        lanes_(std::min(kTileRows, w.out_channels - first_)),
        bias_(w.bias == nullptr ? zero() : load16(w.bias + first_)),
        channel_add_(epilogue.channel_add == nullptr
                         ? zero()
                         : load_n(epilogue.channel_add + first_, lanes_)),
        out_(out) {}

  void finish(F32x16 sum, std::ptrdiff_t pixel) const {
    const std::ptrdiff_t at = pixel * channels_ + first_;
    F32x16 v = add(add(sum, bias_), channel_add_);
    if (lanes_ == kTileRows) {
      if (epilogue_.residual != nullptr) v = add(v, load16(epilogue_.residual + at));
      store16(out_ + at, activated(v));
    } else {
      if (epilogue_.residual != nullptr) v = add(v, load_n(epilogue_.residual + at, lanes_));
      store_n(out_ + at, activated(v), lanes_);
    }
  }

 private:
  F32x16 activated(F32x16 v) const {
    switch (epilogue_.activation) {
      case ConvActivation::relu:
        return max(zero(), v);
      case ConvActivation::silu:
        return mul(v, sigmoid(v));
      default:
        return v;
    }
  }

  const ConvEpilogue& epilogue_;
  const std::ptrdiff_t channels_;
  const int first_;
  const int lanes_;
  const F32x16 bias_;
  const F32x16 channel_add_;
  float* const out_;
};

}  // namespace fuserve::FUSERVE_ISA
