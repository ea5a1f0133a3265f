// GroupNorm (arXiv 1803.08494) of an image that lies in one or two sources, as a scale and a shift
// for each channel, which consumers apply while they read.
#pragma once

#include "image/program.h"

namespace fuserve::FUSERVE_ISA {

// For each channel the sum of the values' differences from a pivot, then of their squares, over
// `pixels` pixels. Squares of the values themselves would leave little of the variance of a channel
// that is far from zero.
// image: [pixels, channels], pivots: [channels], sums: [2, channels]
void channel_sums(const float* image, const float* pivots, int pixels, int channels, float* sums);

// Of a chunk of the value whose image this is; a row has `chunks_of_row()` of them.
void chunk_sums(const ImageValue& value, const float* image, const float* pivots, int chunk,
                float* sums);

// One source of an image: the sums of its chunks, [chunks][2, channels].
struct NormSource {
  const float* sums = nullptr;
  const float* pivots = nullptr;
  int channels = 0;
};

// The channels of one group, so that normalized = x * scale + shift, of the sums of `chunks` chunks
// with `pixels` pixels in all.
// scale, shift: [channels of both sources]
void group_scales(const GroupNorm& norm, const NormSource (&sources)[2], int chunks, int pixels,
                  int group, float* scale, float* shift);

// out = image * scale + shift, then SiLU if asked.
// image: [pixels, channels], out: rows of `out_stride` floats
void apply_scales(const float* image, int pixels, int channels, const float* scale,
                  const float* shift, bool with_silu, float* out, std::ptrdiff_t out_stride);

}  // namespace fuserve::FUSERVE_ISA
