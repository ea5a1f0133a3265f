// Packed weights back to fp32.
#pragma once

#include <algorithm>

#include "linear/format.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// Features [first, first + cols) of a q8_channel tile in fp32; first is a multiple of 32.
inline void unpack_channel_panel(const std::uint8_t* tile, int first, int cols, float* panel) {
  const F32x16 scale = load16(reinterpret_cast<const float*>(tile));
  const std::uint8_t* values = tile + header_bytes(WeightFormat::q8_channel) + first * kTileRows;
  for (int k = 0; k < cols; ++k) {
    const I32x16 byte = unsigned_byte(load_i32(values + k / 4 * 64), k % 4);
    store16(panel + k * kTileRows, mul(sub(to_float(byte), set1(128.0F)), scale));
  }
}

// Features [first, first + cols) of a tile in fp32; first is a multiple of 32. Of any format but
// f32, which is read where it lies.
// panel: [cols][16]
inline void unpack_panel(const PackedLinear& w, int tile, int first, int cols, float* panel) {
  const std::uint8_t* data = w.tile(tile);
  const auto at = static_cast<std::ptrdiff_t>(first) * kTileRows;
  if (!is_integer(w.format)) {
    for (int k = 0; k < cols; ++k) {
      const auto i = at + static_cast<std::ptrdiff_t>(k) * kTileRows;
      const F32x16 values = w.format == WeightFormat::f16
                                ? load16(reinterpret_cast<const Half*>(data) + i)
                                : load16(reinterpret_cast<const BFloat*>(data) + i);
      store16(panel + k * kTileRows, values);
    }
    return;
  }
  if (w.format == WeightFormat::q8_channel) return unpack_channel_panel(data, first, cols, panel);
  const int per_group = w.blocks_per_group();
  const int header = header_bytes(w.format), bytes = block_bytes(w.format);
  for (int col = 0; col < cols; col += kBlockCols) {
    const int block = (first + col) / kBlockCols, group = block / per_group;
    const std::uint8_t* group_data =
        data + static_cast<std::ptrdiff_t>(group) * (header + per_group * bytes);
    const auto* scales = reinterpret_cast<const Half*>(group_data);
    const std::uint8_t* values = group_data + header + (block - group * per_group) * bytes;
    const F32x16 scale = load16(scales);
    const int left = std::min(kBlockCols, cols - col);
    float* out = panel + col * kTileRows;
    const F32x16 offset = w.format == WeightFormat::q8   ? zero()
                          : w.format == WeightFormat::q4 ? mul(scale, set1(-8.0F))
                                                         : load16(scales + kTileRows);
    // Four bytes of a row are one lane of 32 bits.
    for (int k = 0; k < left; ++k) {
      const I32x16 lanes = load_i32(values + (w.format == WeightFormat::q8 ? k / 4 : k / 8) * 64);
      const I32x16 code = w.format == WeightFormat::q8 ? signed_byte(lanes, k % 4)
                                                       : nibble(lanes, k % 4, k % 8 >= 4);
      store16(out + k * kTileRows, fma(to_float(code), scale, offset));
    }
  }
}

// All features of one row of a tile in fp32.  out: [cols]
inline void unpack_lane(const PackedLinear& w, int tile, int lane, float* out) {
  const std::uint8_t* data = w.tile(tile);
  if (!is_integer(w.format)) {
    for (int k = 0; k < w.cols; ++k) {
      const std::ptrdiff_t i = static_cast<std::ptrdiff_t>(k) * kTileRows + lane;
      out[k] = w.format == WeightFormat::f32   ? reinterpret_cast<const float*>(data)[i]
               : w.format == WeightFormat::f16 ? to_float(reinterpret_cast<const Half*>(data)[i])
                                               : to_float(reinterpret_cast<const BFloat*>(data)[i]);
    }
    return;
  }
  if (w.format == WeightFormat::q8_channel) {
    const float row_scale = reinterpret_cast<const float*>(data)[lane];
    data += header_bytes(w.format) + 4 * lane;
    for (int k = 0; k < w.cols; ++k)
      out[k] = static_cast<float>(data[k / 4 * 64 + k % 4] - 128) * row_scale;
    return;
  }
  float scale = 0.0F, offset = 0.0F;
  for (int block = 0; block < w.blocks(); ++block) {
    if (block % w.blocks_per_group() == 0) {
      const auto* header = reinterpret_cast<const Half*>(data);
      scale = to_float(header[lane]);
      offset = w.format == WeightFormat::q8   ? 0.0F
               : w.format == WeightFormat::q4 ? -8.0F * scale
                                              : to_float(header[kTileRows + lane]);
      data += header_bytes(w.format);
    }
    const int first = block * kBlockCols, count = std::min(kBlockCols, w.cols - first);
    for (int k = 0; k < count; ++k) {
      const std::uint8_t byte = w.format == WeightFormat::q8 ? data[k / 4 * 64 + 4 * lane + k % 4]
                                                             : data[k / 8 * 64 + 4 * lane + k % 4];
      const int code = w.format == WeightFormat::q8 ? static_cast<std::int8_t>(byte)
                       : k % 8 < 4                  ? byte & 15
                                                    : byte >> 4;
      out[first + k] = static_cast<float>(code) * scale + offset;
    }
    data += block_bytes(w.format);
  }
}

}  // namespace fuserve::FUSERVE_ISA
