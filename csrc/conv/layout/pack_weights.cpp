#include "conv/layout/pack_weights.h"

#include <algorithm>
#include <array>

#include "simd/types.h"

namespace fuserve {
namespace {

constexpr int kMostComponents = 36;

// The filter transforms G of arXiv 1509.09308, whose points are 0, 1, -1 (, 2, -2) and infinity.
constexpr double kFilter2[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
constexpr double kFilter4[6][3] = {{1.0 / 4, 0, 0},
                                   {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                                   {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                                   {1.0 / 24, 1.0 / 12, 1.0 / 6},
                                   {1.0 / 24, -1.0 / 12, 1.0 / 6},
                                   {0, 0, 1}};

// components = G filter G^T
void transform_filter(const double (*g)[3], int side, const float* filter, float* components) {
  double left[6][3];
  for (int i = 0; i < side; ++i)
    for (int col = 0; col < 3; ++col)
      left[i][col] = g[i][0] * static_cast<double>(filter[col]) +
                     g[i][1] * static_cast<double>(filter[3 + col]) +
                     g[i][2] * static_cast<double>(filter[6 + col]);
  for (int i = 0; i < side; ++i)
    for (int j = 0; j < side; ++j)
      components[i * side + j] =
          static_cast<float>(left[i][0] * g[j][0] + left[i][1] * g[j][1] + left[i][2] * g[j][2]);
}

// What phase p sums of three taps in a direction: of its two, the first is tap 0, or 0 and 1.
constexpr int phase_tap(int phase, int tap) { return tap == 0 ? 0 : tap == 1 ? 1 - phase : 1; }

struct Packer {
  const ConvShape& shape;
  SourceType type;
  const void* weights;
  std::uint8_t* packed;

  float source(size_t at) const {
    if (type == SourceType::f32) return static_cast<const float*>(weights)[at];
    return type == SourceType::f16 ? to_float(static_cast<const Half*>(weights)[at])
                                   : to_float(static_cast<const BFloat*>(weights)[at]);
  }
  void store(size_t at, float value) const {
    if (shape.half)
      reinterpret_cast<Half*>(packed)[at] = to_half(value);
    else
      reinterpret_cast<float*>(packed)[at] = value;
  }
  int filter_values() const { return shape.size * shape.size; }
  // Writes what becomes of one filter: for each phase its taps, or its components.
  void derive(const float* filter, float* derived) const;
  void pack_tile(int tile) const;
};

void Packer::derive(const float* filter, float* derived) const {
  if (shape.is_winograd()) {
    const bool four = shape.method == ConvMethod::winograd4;
    transform_filter(four ? kFilter4 : kFilter2, four ? 6 : 4, filter, derived);
  } else if (shape.upsample) {
    std::array<double, 16> sums{};
    for (int phase = 0; phase < 4; ++phase)
      for (int tap = 0; tap < 9; ++tap)
        sums[static_cast<size_t>(phase * 4 + phase_tap(phase / 2, tap / 3) * 2 +
                                 phase_tap(phase % 2, tap % 3))] +=
            static_cast<double>(filter[tap]);
    std::transform(sums.begin(), sums.end(), derived,
                   [](double sum) { return static_cast<float>(sum); });
  } else {
    std::copy_n(filter, filter_values(), derived);
  }
}

void Packer::pack_tile(int tile) const {
  const int each = shape.phases() * shape.taps() * shape.components();
  for (int index = 0; index < shape.blocks(); ++index) {
    const ChannelBlock block = shape.block(index);
    for (int c = 0; c < block.count; ++c) {
      for (int lane = 0; lane < kTileRows; ++lane) {
        const int row = tile * kTileRows + lane;
        float filter[9] = {}, derived[kMostComponents];
        const size_t at = (static_cast<size_t>(row) * static_cast<size_t>(shape.in_channels()) +
                           static_cast<size_t>(block.channel + c)) *
                          static_cast<size_t>(filter_values());
        for (int i = 0; row < shape.out_channels && i < filter_values(); ++i)
          filter[i] = source(at + static_cast<size_t>(i));
        derive(filter, derived);
        for (int i = 0; i < each; ++i) {
          const size_t to =
              shape.method == ConvMethod::direct
                  ? shape.panel_offset(block, i / shape.taps(), tile) +
                        static_cast<size_t>((i % shape.taps() * block.count + c) * kTileRows)
                  : shape.component_offset(tile, i) +
                        static_cast<size_t>((block.channel + c) * kTileRows);
          store(to + static_cast<size_t>(lane), derived[i]);
        }
      }
    }
  }
}

}  // namespace

void pack_conv(const ConvShape& shape, SourceType type, const void* weights, std::uint8_t* packed,
               ThreadPool& pool) {
  const Packer packer{shape, type, weights, packed};
  pool.run([&](Team& team, int thread) {
    team.for_each(thread, shape.tiles(), [&](int tile) { packer.pack_tile(tile); });
  });
}

}  // namespace fuserve
