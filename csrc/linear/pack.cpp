#include "linear/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// One row's codes and scales, padded to whole blocks.
struct QuantizedRow {
  std::vector<std::uint8_t> codes;  // [blocks * 32]
  std::vector<Half> scales;         // [groups]
  std::vector<Half> minimums;       // [groups]
  float channel_scale = 0.0F;       // q8_channel's only scale
};

template <class T>
void widen(const T* source, int count, float* out) {
  int k = 0;
  for (; k + 16 <= count; k += 16) store16(out + k, load16(source + k));
  if (k == count) return;
  T tail[16] = {};
  std::copy(source + k, source + count, tail);
  store_n(out + k, load16(tail), count - k);
}

void read_row(const PackSource& source, int row, int cols, float* out) {
  const std::ptrdiff_t at = row * source.row_stride;
  if (source.type == SourceType::f32)
    widen(static_cast<const float*>(source.data) + at, cols, out);
  else if (source.type == SourceType::f16)
    widen(static_cast<const Half*>(source.data) + at, cols, out);
  else
    widen(static_cast<const BFloat*>(source.data) + at, cols, out);
}

// codes = clamp(round((x - offset) / scale) + center); x is padded to whole blocks.
void round_to_codes(const float* x, int count, float scale, float offset, float center,
                    float lowest, float highest, std::uint8_t* codes) {
  const float inverse = scale != 0.0F ? 1.0F / scale : 0.0F;
  for (int k = 0; k < count; k += 16) {
    const F32x16 q = add(round(mul(sub(load16(x + k), set1(offset)), set1(inverse))), set1(center));
    float values[16];
    store16(values, min(set1(highest), max(set1(lowest), q)));
    for (int i = 0; i < 16; ++i)
      codes[k + i] = static_cast<std::uint8_t>(static_cast<int>(values[i]));
  }
}

// Round-to-nearest of one group. The scale is rounded to f16 first, so that the codes are nearest
// under the scale that is stored.
void quantize_group(const float* x, int count, WeightFormat format, Half& scale, Half& minimum,
                    std::uint8_t* codes) {
  const int padded = round_up(count, kBlockCols);
  const auto [low, high] = std::minmax_element(x, x + count);
  minimum = Half{};
  if (format == WeightFormat::q4_asymmetric) {
    minimum = to_half(*low);
    scale = to_half((*high - to_float(minimum)) / 15.0F);
    round_to_codes(x, padded, to_float(scale), to_float(minimum), 0.0F, 0.0F, 15.0F, codes);
  } else if (format == WeightFormat::q4) {
    // The extreme of largest magnitude becomes code 0, the end of the range that reaches to -8.
    scale = to_half((*high > -*low ? *high : *low) / -8.0F);
    round_to_codes(x, padded, to_float(scale), 0.0F, 8.0F, 0.0F, 15.0F, codes);
  } else {
    scale = to_half(std::max(*high, -*low) / 127.0F);
    round_to_codes(x, padded, to_float(scale), 0.0F, 0.0F, -127.0F, 127.0F, codes);
  }
  // Padding must not count: its activations are zero, but so should its codes be.
  std::fill(codes + count, codes + padded, std::uint8_t{0});
}

// The same for a row with one scale in fp32 and codes in bytes of q + 128.
float quantize_channel(const float* x, int count, std::uint8_t* codes) {
  const int padded = round_up(count, kBlockCols);
  const auto [low, high] = std::minmax_element(x, x + count);
  const float scale = std::max(*high, -*low) / 127.0F;
  round_to_codes(x, padded, scale, 0.0F, 128.0F, 1.0F, 255.0F, codes);
  std::fill(codes + count, codes + padded, std::uint8_t{128});
  return scale;
}

// A whole row's scale, to where the packed layout has it again.
void repeat_scales(const LinearShape& shape, QuantizedRow& row) {
  if (shape.group != 0) return;
  std::fill(row.scales.begin(), row.scales.end(), row.scales.front());
  std::fill(row.minimums.begin(), row.minimums.end(), row.minimums.front());
}

void quantize(const LinearShape& shape, const PackSource& source, int row, float* values,
              QuantizedRow& out) {
  read_row(source, row, shape.cols, values);
  if (shape.format == WeightFormat::q8_channel) {
    out.channel_scale = quantize_channel(values, shape.cols, out.codes.data());
    return;
  }
  const int group_cols = shape.group ? shape.group : shape.cols;
  for (int g = 0; g < shape.scales(); ++g) {
    const int first = g * group_cols, count = std::min(group_cols, shape.cols - first);
    const auto i = static_cast<size_t>(g);
    quantize_group(values + first, count, shape.format, out.scales[i], out.minimums[i],
                   out.codes.data() + first);
  }
  repeat_scales(shape, out);
}

void take_codes(const LinearShape& shape, const PackSource& source, int row, QuantizedRow& out) {
  std::memcpy(out.codes.data(),
              static_cast<const std::uint8_t*>(source.data) + row * source.row_stride,
              static_cast<size_t>(shape.cols));
  if (shape.format == WeightFormat::q8_channel) {
    out.channel_scale = source.scales[row];
    for (int k = 0; k < shape.cols; ++k) out.codes[static_cast<size_t>(k)] ^= 0x80;
    return;
  }
  const auto groups = static_cast<std::ptrdiff_t>(shape.scales());
  for (std::ptrdiff_t g = 0; g < groups; ++g) {
    const auto i = static_cast<size_t>(g);
    out.scales[i] = to_half(source.scales[row * groups + g]);
    if (source.minimums != nullptr) out.minimums[i] = to_half(source.minimums[row * groups + g]);
  }
  repeat_scales(shape, out);
}

void clear(QuantizedRow& row) {
  std::fill(row.codes.begin(), row.codes.end(), std::uint8_t{0});
  std::fill(row.scales.begin(), row.scales.end(), Half{});
  std::fill(row.minimums.begin(), row.minimums.end(), Half{});
  row.channel_scale = 0.0F;
}

void write_header(WeightFormat format, const std::vector<QuantizedRow>& rows, size_t group,
                  std::uint8_t* out) {
  for (size_t lane = 0; lane < kTileRows; ++lane) {
    if (format == WeightFormat::q8_channel) {
      reinterpret_cast<float*>(out)[lane] = rows[lane].channel_scale;
      continue;
    }
    auto* header = reinterpret_cast<Half*>(out);
    header[lane] = rows[lane].scales[group];
    if (format == WeightFormat::q4_asymmetric)
      header[kTileRows + lane] = rows[lane].minimums[group];
  }
}

void interleave(const LinearShape& shape, const std::vector<QuantizedRow>& rows,
                std::uint8_t* out) {
  for (int block = 0; block < shape.blocks(); ++block) {
    if (block % shape.blocks_per_group() == 0) {
      write_header(shape.format, rows, static_cast<size_t>(block / shape.blocks_per_group()), out);
      out += header_bytes(shape.format);
    }
    for (size_t lane = 0; lane < kTileRows; ++lane) {
      const std::uint8_t* codes = rows[lane].codes.data() + block * kBlockCols;
      if (!is_q4(shape.format)) {
        for (int j = 0; j < 8; ++j) std::memcpy(out + 64 * j + 4 * lane, codes + 4 * j, 4);
        continue;
      }
      for (int j = 0; j < 4; ++j) {
        std::uint32_t low, high;
        std::memcpy(&low, codes + 8 * j, 4);
        std::memcpy(&high, codes + 8 * j + 4, 4);
        low |= high << 4;
        std::memcpy(out + 64 * j + 4 * lane, &low, 4);
      }
    }
    out += block_bytes(shape.format);
  }
}

void pack_integer_tile(const LinearShape& shape, const PackSource& source, int tile,
                       std::vector<float>& values, std::vector<QuantizedRow>& rows,
                       std::uint8_t* out) {
  for (int lane = 0; lane < kTileRows; ++lane) {
    QuantizedRow& quantized = rows[static_cast<size_t>(lane)];
    const int row = shape.source_row(tile, lane);
    if (row < 0)
      clear(quantized);
    else if (source.type == SourceType::codes)
      take_codes(shape, source, row, quantized);
    else
      quantize(shape, source, row, values.data(), quantized);
  }
  interleave(shape, rows, out);
}

void store_feature(WeightFormat format, std::uint8_t* out, std::ptrdiff_t index, float value) {
  if (format == WeightFormat::f32) {
    reinterpret_cast<float*>(out)[index] = value;
  } else if (format == WeightFormat::f16) {
    reinterpret_cast<Half*>(out)[index] = to_half(value);
  } else {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const bool is_nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
    const std::uint32_t rounded = is_nan ? bits : bits + 0x7FFFU + ((bits >> 16) & 1U);
    reinterpret_cast<std::uint16_t*>(out)[index] = static_cast<std::uint16_t>(rounded >> 16);
  }
}

void pack_float_tile(const LinearShape& shape, const PackSource& source, int tile,
                     std::vector<float>& values, std::uint8_t* out) {
  for (int lane = 0; lane < kTileRows; ++lane) {
    const int row = shape.source_row(tile, lane);
    if (row < 0)
      std::fill(values.begin(), values.end(), 0.0F);
    else
      read_row(source, row, shape.cols, values.data());
    for (int k = 0; k < shape.cols; ++k)
      store_feature(shape.format, out, static_cast<std::ptrdiff_t>(k) * kTileRows + lane,
                    values[static_cast<size_t>(k)]);
  }
}

}  // namespace

void pack_tiles(const LinearShape& shape, const PackSource& source, int first, int last,
                std::uint8_t* packed) {
  const auto padded = static_cast<size_t>(shape.blocks()) * kBlockCols;
  std::vector<float> values(padded, 0.0F);
  std::vector<QuantizedRow> rows;
  if (is_integer(shape.format)) {
    const auto groups = static_cast<size_t>(shape.groups());
    rows.assign(kTileRows, {std::vector<std::uint8_t>(padded), std::vector<Half>(groups),
                            std::vector<Half>(groups)});
  }
  for (int tile = first; tile < last; ++tile) {
    std::uint8_t* out = packed + static_cast<size_t>(tile) * shape.tile_bytes();
    if (is_integer(shape.format))
      pack_integer_tile(shape, source, tile, values, rows, out);
    else
      pack_float_tile(shape, source, tile, values, out);
  }
}

}  // namespace fuserve::FUSERVE_ISA
