// The product that all convolutions come down to: some pixels times panels of weights.
#pragma once

#include "conv/conv_types.h"
#include "simd/products.h"

namespace fuserve::FUSERVE_ISA {

inline constexpr int kPixels = kFloatTokens;

// Where a panel's taps find their values: `channels` at each offset from a pixel's own.
struct Taps {
  int count;
  int channels;
  std::array<std::ptrdiff_t, 9> offsets;
};

// Bytes that later products want, fetched into the second-level cache meanwhile.
struct Fetch {
  const std::uint8_t* from;
  int lines;
};

// kPixels pixels times R panels [tap][channel][16], added to what stands in sums unless `first`.
// Channels, or pairs of them, lie Step values apart in a panel.
//   sums: [kPixels][16] for each panel, sum_stride apart
template <int R, int Step = kTileRows, typename Value>
inline void multiply(const Value* const (&x)[kPixels], const Taps& taps, const Value* panel,
                     std::ptrdiff_t panel_stride, bool first, typename Products<Value>::Sum* sums,
                     std::ptrdiff_t sum_stride, const Fetch& fetch) {
  using P = Products<Value>;
  typename P::Sums acc[R][kPixels];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < kPixels; ++t)
      acc[r][t] = first ? P::none() : P::load(sums + r * sum_stride + t * kTileRows);
  for (int line = 0; line < fetch.lines; ++line) prefetch(fetch.from + 64 * line);
  for (int tap = 0; tap < taps.count; ++tap) {
    const std::ptrdiff_t from = taps.offsets[static_cast<size_t>(tap)];
#pragma GCC unroll 4
    for (std::ptrdiff_t k = from; k < from + taps.channels; ++k, panel += Step) {
      decltype(load16(panel)) weights[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) weights[r] = load16(panel + r * panel_stride);
#pragma GCC unroll 16
      for (int t = 0; t < kPixels; ++t) {
        const auto value = set1(x[t][k]);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][t] = fma(weights[r], value, acc[r][t]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < kPixels; ++t) P::store(sums + r * sum_stride + t * kTileRows, acc[r][t]);
}

// `values` weights in fp32: where they are packed, or widened into `room`.
inline const float* widened(const PackedConv& w, size_t offset, size_t values, float* room) {
  if (!w.is_half()) return reinterpret_cast<const float*>(w.data + offset);
  const auto* packed = reinterpret_cast<const Half*>(w.data + offset);
  for (size_t i = 0; i < values; i += kTileRows) store16(room + i, load16(packed + i));
  return room;
}

}  // namespace fuserve::FUSERVE_ISA
