#include "conv/layout/pack_weights.h"

#include <algorithm>
#include <array>

#include "simd/types.h"

namespace fuserve {
namespace {

constexpr int kMostDerived = 16;  // 2x2 taps of four phases

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
  // Writes what becomes of one filter: the taps of each phase.
  void derive(const float* filter, float* derived) const;
  void pack_tile(int tile) const;
};

void Packer::derive(const float* filter, float* derived) const {
  if (shape.upsample) {
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
  const int each = shape.phases() * shape.taps();
  for (int index = 0; index < shape.blocks(); ++index) {
    const ChannelBlock block = shape.block(index);
    for (int c = 0; c < block.count; ++c) {
      for (int lane = 0; lane < kTileRows; ++lane) {
        const int row = tile * kTileRows + lane;
        float filter[9] = {}, derived[kMostDerived];
        const size_t at = (static_cast<size_t>(row) * static_cast<size_t>(shape.in_channels()) +
                           static_cast<size_t>(block.channel + c)) *
                          static_cast<size_t>(filter_values());
        for (int i = 0; row < shape.out_channels && i < filter_values(); ++i)
          filter[i] = source(at + static_cast<size_t>(i));
        derive(filter, derived);
        for (int i = 0; i < each; ++i) {
          const size_t to = shape.panel_offset(block, i / shape.taps(), tile) +
                            static_cast<size_t>((i % shape.taps() * block.count + c) * kTileRows);
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
