// Weight formats and the packed layout that every linear kernel reads.
//
// A weight matrix [rows, cols] is cut into tiles of 16 output rows. Inside a tile the features run
// in order, so that one sequential stream of memory feeds the kernels:
//   f32, f16, bf16   for each feature: 16 values, one per row
//   q8, q4           for each group of features: 16 f16 scales (q4 asymmetric: then 16 f16
//                    minimums), then for each block of 32 features, for each four features
//                    (q4: eight), for each row: its four bytes. A q4 byte holds feature k+i in its
//                    low and feature k+4+i in its high nibble.
//                    One scale for all features of a row stands once in q8; in q4 it is repeated
//                    every 128 features, so that the kernels know no other groups there.
//   q8_channel       16 f32 scales, then as q8, but each byte is q + 128
// q8 value = scale * q; q4 symmetric = scale * (q - 8); q4 asymmetric = scale * q + minimum.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fuserve {

enum class WeightFormat : int {
  f32 = 0,
  f16 = 1,
  bf16 = 2,
  q8 = 3,
  q4 = 4,
  q4_asymmetric = 5,
  q8_channel = 6
};

inline constexpr int kTileRows = 16;
inline constexpr int kBlockCols = 32;    // features that share an activation scale
inline constexpr int kRepeatBlocks = 4;  // after so many blocks q4 repeats a whole row's scale

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

constexpr bool is_integer(WeightFormat f) { return f >= WeightFormat::q8; }
constexpr bool is_q4(WeightFormat f) {
  return f == WeightFormat::q4 || f == WeightFormat::q4_asymmetric;
}

// Bytes of 16 rows over one block of 32 features, without scales.
constexpr int block_bytes(WeightFormat f) {
  switch (f) {
    case WeightFormat::f32:
      return kTileRows * kBlockCols * 4;
    case WeightFormat::f16:
    case WeightFormat::bf16:
      return kTileRows * kBlockCols * 2;
    case WeightFormat::q8:
    case WeightFormat::q8_channel:
      return kTileRows * kBlockCols;
    default:
      return kTileRows * kBlockCols / 2;
  }
}

// Bytes of the scales (and minimums) that stand before each group of a tile.
constexpr int header_bytes(WeightFormat f) {
  if (!is_integer(f)) return 0;
  const bool two_halves = f == WeightFormat::q4_asymmetric || f == WeightFormat::q8_channel;
  return two_halves ? 4 * kTileRows : 2 * kTileRows;
}

struct LinearShape {
  WeightFormat format = WeightFormat::f32;
  int rows = 0;       // output features, without padding
  int cols = 0;       // input features
  int group = 0;      // features that share a scale, a multiple of 32; 0: all of them
  int row_group = 0;  // rows that start on a tile of their own (a head's); 0: all of them

  int rows_per_group() const { return row_group ? row_group : rows; }
  int tiles_per_group() const { return ceil_div(rows_per_group(), kTileRows); }
  int tiles() const { return rows / rows_per_group() * tiles_per_group(); }
  int blocks() const { return ceil_div(cols, kBlockCols); }
  int blocks_per_group() const {
    if (group != 0) return group / kBlockCols;
    return is_q4(format) ? kRepeatBlocks : blocks();
  }
  // Scales of a row as quantizers give them.
  int scales() const { return group ? groups() : 1; }
  // As they are packed.
  int groups() const { return ceil_div(blocks(), blocks_per_group()); }

  size_t tile_bytes() const {
    if (!is_integer(format))
      return static_cast<size_t>(cols) * static_cast<size_t>(block_bytes(format) / kBlockCols);
    return static_cast<size_t>(blocks()) * static_cast<size_t>(block_bytes(format)) +
           static_cast<size_t>(groups()) * static_cast<size_t>(header_bytes(format));
  }
  // Bytes from a tile's start to a block that begins a group, of an integer format.
  std::ptrdiff_t block_offset(int block) const {
    return static_cast<std::ptrdiff_t>(block) * block_bytes(format) +
           static_cast<std::ptrdiff_t>(block / blocks_per_group()) * header_bytes(format);
  }
  size_t packed_bytes() const { return static_cast<size_t>(tiles()) * tile_bytes(); }

  // Source row of lane `lane` of tile `tile`, or -1 where the tile is padding.
  int source_row(int tile, int lane) const {
    const int in_group = tile % tiles_per_group() * kTileRows + lane;
    if (in_group >= rows_per_group()) return -1;
    return tile / tiles_per_group() * rows_per_group() + in_group;
  }
};

// What a linear makes of a row of its input x before the product.
enum class InputKind : int {
  blocks = 0,   // int8, a scale for each block of 32 features (fp32 where weights are)
  floats = 1,   // fp32; integer weights are unpacked to fp32 panels
  token = 2,    // int8, one scale, of the row's largest value
  fixed = 3,    // int8, one scale, the same for all rows
  outliers = 4  // as token, but values beyond a threshold stay fp32 (LLM.int8(), arXiv 2208.07339)
};

struct LinearInput {
  InputKind kind = InputKind::blocks;
  float scale = 0.0F;                 // fixed: x stands for round(x / scale)
  float threshold = 0.0F;             // outliers: values of larger magnitude stay fp32
  const float* shift = nullptr;       // [cols], subtracted first; null: none
  const float* multiplier = nullptr;  // [cols], multiplied then; null: none

  bool is_whole_row() const { return kind >= InputKind::token; }
  bool is_transformed() const { return shift != nullptr || multiplier != nullptr; }
  bool operator==(const LinearInput&) const = default;
};

struct PackedLinear : LinearShape {
  const std::uint8_t* data = nullptr;
  const float* bias = nullptr;  // [tiles * 16], zero in the padding; null: none
  LinearInput input;

  bool wants_token_rows() const { return input.is_whole_row(); }
  bool wants_quantized_input() const {
    return is_integer(format) && input.kind == InputKind::blocks;
  }
  const std::uint8_t* tile(int t) const { return data + static_cast<size_t>(t) * tile_bytes(); }
};

}  // namespace fuserve
