// The kernels of one instruction set, behind plain function pointers.
#pragma once

#include <memory>
#include <string>

#include "attention/attention_types.h"
#include "conv/conv_types.h"
#include "decoder/decoder.h"
#include "image/program.h"
#include "linear/format.h"
#include "linear/pack_source.h"
#include "norm/norm_types.h"
#include "runtime/team.h"

namespace fuserve {

struct Kernels {
  const char* isa;
  void (*pack)(const LinearShape&, const PackSource&, std::uint8_t* packed, ThreadPool&);
  // out = x W^T + bias.  x: [rows, cols], out: [rows, w.tiles() * 16]
  void (*linear)(const PackedLinear&, const float* x, int rows, float* out, ThreadPool&);
  void (*unpack_row)(const PackedLinear&, int row, float* out);
  void (*normalize)(const Norm&, const float* x, int rows, int size, float* out);
  // Appends keys and values of consecutive tokens, then attends from them.
  // queries: [tokens, heads, padded], keys and values: [tokens, kv heads, padded],
  // out: [tokens, heads, head dim]
  void (*attention)(const AttentionShape&, const KVCache&, AttentionTask, const float* keys,
                    const float* values, float* out);
  // out = the sum of the parts, added as a tree.  parts: [count][size]
  void (*add_parts)(const float* const* parts, int count, int size, float* out);
  // out: [batch][out height, out width, out channels], an input and an epilogue for each image
  void (*convolve)(const PackedConv&, const ConvInput* inputs, const ConvEpilogue* epilogues,
                   int batch, const ConvUnits&, float* out, ThreadPool&);
  std::unique_ptr<Decoder> (*make_decoder)(DecoderModel, const KVCache&);
  std::unique_ptr<ImageExecutor> (*make_image_executor)();
  double (*read_bandwidth)(ThreadPool&, size_t bytes, int passes);
  double (*fp32_rate)(ThreadPool&);
  double (*byte_dot_rate)(ThreadPool&, bool q4);
  double (*row_dot_rate)(ThreadPool&);
};

// By name, or the best available for an empty name. Throws std::invalid_argument.
const Kernels& kernels(const std::string& isa);

}  // namespace fuserve
