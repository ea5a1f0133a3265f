// The fused decoder: what a model is, and one step of it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attention/attention_types.h"
#include "linear/format.h"
#include "norm/norm_types.h"
#include "runtime/team.h"

namespace fuserve {

enum class Activation : int { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3 };
enum class Residual : int { pre = 0, post = 1, sandwich = 2 };

// Rotary frequencies. With a dynamic base (NTK), positions from `dynamic_from` on use frequencies
// for a sequence that ends with them.
struct Rope {
  int dim = 0;
  bool interleaved = false;
  float attention_factor = 1.0F;
  std::vector<float> inverse_frequencies;  // [dim / 2]
  double dynamic_factor = 0.0;             // 0: not dynamic
  double dynamic_base = 0.0;
  int dynamic_from = 0;
};

struct LayerWeights {
  Norm attn_norm, q_norm, k_norm, post_attn_norm, ffn_norm, post_ffn_norm;
  PackedLinear q, k, v, o, gate, up, down;
  int rope = -1;   // index into DecoderModel::ropes; -1: none
  int window = 0;  // sliding window in tokens; 0: none
};

struct DecoderModel {
  int hidden_size = 0;
  int vocab_size = 0;
  int ffn_size = 0;
  AttentionShape attention;
  float attention_scale = 1.0F;
  bool gated = true;
  Activation activation = Activation::silu;
  Residual residual = Residual::pre;
  float embedding_scale = 1.0F;
  float logit_softcap = 0.0F;                 // 0: none
  const float* position_embedding = nullptr;  // [positions, hidden], from position 0; null: none
  Norm embedding_norm, final_norm;
  PackedLinear embedding, head;
  std::vector<Rope> ropes;
  std::vector<LayerWeights> layers;
};

// Tokens of several sequences; see StepBatch in fuserve.decoder.step.
struct Step {
  int num_tokens = 0;
  int num_sequences = 0;
  int num_logit_rows = 0;
  int table_width = 0;
  const std::int32_t* tokens = nullptr;        // [num_tokens]
  const std::int32_t* positions = nullptr;     // [num_tokens]
  const std::int32_t* query_starts = nullptr;  // [num_sequences + 1]
  const std::int32_t* block_tables = nullptr;  // [num_sequences, table_width]
  const std::int32_t* logit_rows = nullptr;    // [num_logit_rows]
  float* logits = nullptr;                     // [num_logit_rows, vocab_size]
  int num_hidden_rows = 0;
  const std::int32_t* hidden_rows = nullptr;  // [num_hidden_rows]
  float* hidden = nullptr;                    // [num_hidden_rows, hidden_size], after the last norm
};

class Decoder {
 public:
  virtual ~Decoder() = default;
  virtual void step(const Step& step, ThreadPool& pool) = 0;
};

}  // namespace fuserve
