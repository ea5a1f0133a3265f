#include <algorithm>

#include "conv/layout/pack_weights.h"

namespace fuserve {
namespace {

void pack_tile(const ConvShape& shape, const std::int8_t* codes, int tile, std::uint8_t* packed) {
  const std::ptrdiff_t taps = shape.taps(), channels = shape.in_channels();
  for (int index = 0; index < shape.blocks(); ++index) {
    const ChannelBlock block = shape.block(index);
    const int padded = shape.padded(block.count);
    std::uint8_t* panel = packed + shape.panel_offset(block, tile);
    std::fill_n(panel, shape.panel_bytes(padded), std::uint8_t{128});
    for (int lane = 0; lane < kTileRows; ++lane) {
      const int row = tile * kTileRows + lane;
      if (row >= shape.out_channels) break;
      for (int c = 0; c < block.count; ++c)
        for (std::ptrdiff_t tap = 0; tap < taps; ++tap) {
          const std::int8_t code = codes[(row * channels + block.channel + c) * taps + tap];
          panel[tap * padded * kTileRows + c / 4 * 64 + lane * 4 + c % 4] =
              static_cast<std::uint8_t>(code + 128);
        }
    }
  }
}

}  // namespace

void pack_conv_codes(const ConvShape& shape, const std::int8_t* codes, std::uint8_t* packed,
                     ThreadPool& pool) {
  pool.run([&](Team& team, int thread) {
    team.for_each(thread, shape.tiles(), [&](int tile) { pack_tile(shape, codes, tile, packed); });
  });
}

}  // namespace fuserve
