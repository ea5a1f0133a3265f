#include "image/group_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "norm/norm.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// Of 16 * N channels from `image`, for `pixels` pixels.
template <int N>
void sum_lanes(const float* image, const float* pivots, int pixels, int channels, float* sums) {
  F32x16 total[N], squares[N], pivot[N];
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    total[n] = squares[n] = zero();
    pivot[n] = load16(pivots + 16 * n);
  }
  for (int p = 0; p < pixels; ++p) {
    const float* x = image + static_cast<std::ptrdiff_t>(p) * channels;
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      const F32x16 v = sub(load16(x + 16 * n), pivot[n]);
      total[n] = add(total[n], v);
      squares[n] = fma(v, v, squares[n]);
    }
  }
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    store16(sums + 16 * n, total[n]);
    store16(sums + channels + 16 * n, squares[n]);
  }
}

// Sums of one channel over all chunks.
struct ChannelMoments {
  double pivot = 0.0;
  double sum = 0.0;
  double squares = 0.0;
};

ChannelMoments moments_of(const NormSource& source, int chunks, int channel) {
  ChannelMoments total;
  total.pivot = static_cast<double>(source.pivots[channel]);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const float* sums = source.sums + static_cast<std::ptrdiff_t>(chunk) * 2 * source.channels;
    total.sum += static_cast<double>(sums[channel]);
    total.squares += static_cast<double>(sums[source.channels + channel]);
  }
  return total;
}

}  // namespace

void channel_sums(const float* image, const float* pivots, int pixels, int channels, float* sums) {
  int c = 0;
  for (; c + 32 <= channels; c += 32)
    sum_lanes<2>(image + c, pivots + c, pixels, channels, sums + c);
  for (; c + 16 <= channels; c += 16)
    sum_lanes<1>(image + c, pivots + c, pixels, channels, sums + c);
  for (; c < channels; ++c) {
    float total = 0.0F, squares = 0.0F;
    for (int p = 0; p < pixels; ++p) {
      const float v = image[static_cast<std::ptrdiff_t>(p) * channels + c] - pivots[c];
      total += v;
      squares += v * v;
    }
    sums[c] = total;
    sums[channels + c] = squares;
  }
}

void chunk_sums(const ImageValue& value, const float* image, const float* pivots, int chunk,
                float* sums) {
  const int row = chunk / value.chunks_of_row(), col = chunk % value.chunks_of_row() * kNormPixels;
  const std::ptrdiff_t first = static_cast<std::ptrdiff_t>(row) * value.width + col;
  channel_sums(image + first * value.channels, pivots, std::min(kNormPixels, value.width - col),
               value.channels, sums);
}

void group_scales(const GroupNorm& norm, const NormSource (&sources)[2], int chunks, int pixels,
                  int group, float* scale, float* shift) {
  const int size = norm.channels / norm.groups;
  const int first = group * size, last = first + size, cut = sources[0].channels;
  std::vector<ChannelMoments> channels;
  for (int c = first; c < last; ++c)
    channels.push_back(c < cut ? moments_of(sources[0], chunks, c)
                               : moments_of(sources[1], chunks, c - cut));
  const double each = static_cast<double>(pixels), count = each * size;
  double mean = 0.0, variance = 0.0;
  for (const ChannelMoments& c : channels) mean += (c.sum + each * c.pivot) / count;
  for (const ChannelMoments& c : channels) {
    const double offset = mean - c.pivot;
    variance += (c.squares - 2.0 * offset * c.sum + each * offset * offset) / count;
  }
  variance = std::max(variance, 0.0);
  const double inverse = 1.0 / std::sqrt(variance + static_cast<double>(norm.eps));
  for (int c = first; c < last; ++c) {
    const double factor = inverse * static_cast<double>(norm.weight[c]);
    scale[c] = static_cast<float>(factor);
    shift[c] = static_cast<float>(static_cast<double>(norm.bias[c]) - mean * factor);
  }
}

void apply_scales(const float* image, int pixels, int channels, const float* scale,
                  const float* shift, bool with_silu, float* out, std::ptrdiff_t out_stride) {
  for (int p = 0; p < pixels; ++p) {
    const float* x = image + static_cast<std::ptrdiff_t>(p) * channels;
    float* y = out + p * out_stride;
    for_lanes(channels, [&](int c, int n) {
      const auto load = [&](const float* from) {
        return n == 16 ? load16(from + c) : load_n(from + c, n);
      };
      F32x16 v = fma(load(x), load(scale), load(shift));
      if (with_silu) v = silu(v);
      n == 16 ? store16(y + c, v) : store_n(y + c, v, n);
    });
  }
}

}  // namespace fuserve::FUSERVE_ISA
