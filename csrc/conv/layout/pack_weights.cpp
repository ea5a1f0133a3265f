#include "conv/layout/pack_weights.h"

#include "simd/types.h"

namespace fuserve {
namespace {

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
    if (shape.is_half())
      reinterpret_cast<Half*>(packed)[at] = to_half(value);
    else
      reinterpret_cast<float*>(packed)[at] = value;
  }
  void pack_tile(int tile) const;
};

void Packer::pack_tile(int tile) const {
  const auto channels = static_cast<size_t>(shape.in_channels());
  const auto taps = static_cast<size_t>(shape.taps());
  for (int index = 0; index < shape.blocks(); ++index) {
    const ChannelBlock block = shape.block(index);
    const auto count = static_cast<size_t>(block.count);
    const size_t panel = shape.panel_offset(block, tile) / shape.value_bytes();
    for (size_t c = 0; c < count; ++c)
      for (size_t lane = 0; lane < kTileRows; ++lane) {
        const auto row = static_cast<size_t>(tile * kTileRows) + lane;
        const bool is_padding = row >= static_cast<size_t>(shape.out_channels);
        const size_t filter = (row * channels + static_cast<size_t>(block.channel) + c) * taps;
        for (size_t tap = 0; tap < taps; ++tap)
          store(panel + (tap * count + c) * kTileRows + lane,
                is_padding ? 0.0F : source(filter + tap));
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
