// The memory of a step: activations shared by all threads, and each thread's own.
#pragma once

#include <algorithm>
#include <vector>

#include "decoder/decoder.h"
#include "linear/row_buffer.h"
#include "runtime/buffer.h"

namespace fuserve::FUSERVE_ISA {

struct ThreadMemory {
  RowBuffer input[kMostParts];  // one row, prepared by this thread for itself
  Scratch product;              // outputs of linear_tiles before the epilogue
  Scratch linear;               // unpacked panels
  Scratch attention;            // scores and widened blocks
  Scratch softmax;              // running softmax states
};

struct Workspace {
  float* hidden = nullptr;  // [tokens, hidden]
  // [tokens, hidden]: a half-layer's output before its norm, or this rank's part of it
  float* branch = nullptr;
  float* queries = nullptr;            // [tokens, heads, padded head dim]
  float* attention = nullptr;          // [tokens, heads * head dim]
  std::vector<float*> cosines, sines;  // for each rope: [tokens, dim / 2]
  // By the parts of the features where a linear wants them in parts, else the first:
  RowBuffer input[kMostParts];  // normalized rows, or feed-forward rows as they are wanted
  RowBuffer inner[kMostParts];  // feed-forward activations
  std::vector<ThreadMemory> threads;

  void reserve(const DecoderModel& model, int tokens, int num_threads) {
    const auto t = static_cast<size_t>(tokens), h = static_cast<size_t>(model.hidden_size);
    const auto heads = static_cast<size_t>(model.attention.num_heads);
    const auto padded = static_cast<size_t>(model.attention.padded_head_dim());
    const int attention_cols = model.attention.num_heads * model.attention.head_dim;
    hidden = memory_[0].get<float>(t * h);
    branch = memory_[1].get<float>(t * h);
    queries = memory_[2].get<float>(t * heads * padded);
    attention = memory_[3].get<float>(t * static_cast<size_t>(attention_cols));
    size_t angles = 0;
    for (const Rope& rope : model.ropes) angles += t * static_cast<size_t>(rope.dim);
    auto* memory = memory_[4].get<float>(angles);
    cosines.clear();
    sines.clear();
    for (const Rope& rope : model.ropes) {
      const size_t count = t * static_cast<size_t>(rope.dim / 2);
      cosines.push_back(memory);
      sines.push_back(memory + count);
      memory += 2 * count;
    }
    const int widest = std::max({model.hidden_size, attention_cols, model.ffn_size});
    threads.resize(static_cast<size_t>(num_threads));
    input[0].reserve(tokens, widest);
    for (ThreadMemory& thread : threads) thread.input[0].reserve(1, widest);
    const LayerWeights& layer = model.layers.front();
    for (size_t part = 0; part < layer.down.parts.size(); ++part)
      inner[part].reserve(tokens, layer.down.parts[part].cols);
    for (const RowSplit* split : {&layer.o, &layer.down})
      for (size_t part = 1; part < split->parts.size(); ++part) {
        input[part].reserve(tokens, split->parts[part].cols);
        for (ThreadMemory& thread : threads) thread.input[part].reserve(1, split->parts[part].cols);
      }
  }

 private:
  Scratch memory_[5];
};

}  // namespace fuserve::FUSERVE_ISA
