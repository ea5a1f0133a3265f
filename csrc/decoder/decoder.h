// The fused decoder: what a model is, and one step of it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attention/attention_types.h"
#include "linear/format.h"
#include "norm/norm_types.h"
#include "runtime/exchange.h"
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

inline constexpr int kMostParts = 4;

// A linear whose input features are cut into parts, of which this rank has some. The parts'
// products are added as a tree, then the ranks' sums, then the bias.
struct RowSplit {
  std::vector<PackedLinear> parts;  // at most kMostParts, each with as many rows
  const float* bias = nullptr;      // [tiles * 16], zero in the padding; null: none

  int cols() const {
    int total = 0;
    for (const PackedLinear& part : parts) total += part.cols;
    return total;
  }
};

struct LayerWeights {
  Norm attn_norm, q_norm, k_norm, post_attn_norm, ffn_norm, post_ffn_norm;
  PackedLinear q, k, v, gate, up;
  RowSplit o, down;
  int rope = -1;   // index into DecoderModel::ropes; -1: none
  int window = 0;  // sliding window in tokens; 0: none
};

// A model, or a part of one: some of the layers, and of their heads and feed-forward features those
// of one rank.
struct DecoderModel {
  int hidden_size = 0;
  int vocab_size = 0;
  std::vector<int> vocab_sizes;  // of each rank's share of the vocabulary
  int first_token = 0;           // of this rank's share
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
  PackedLinear embedding, head;  // embedding: of the first stage, head: of the last
  std::vector<Rope> ropes;
  std::vector<LayerWeights> layers;
  Exchange* exchange = nullptr;  // with the ranks that have the rest of these layers; null: none

  bool is_first_stage() const { return embedding.data != nullptr; }
  bool is_last_stage() const { return head.data != nullptr; }
  // Whether this rank is the one that gets the logits.
  bool gets_logits() const {
    return is_last_stage() && (exchange == nullptr || exchange->rank() == 0);
  }
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
  float* logits = nullptr;                     // [num_logit_rows, vocab_size], if it gets them
  int num_hidden_rows = 0;
  const std::int32_t* hidden_rows = nullptr;  // [num_hidden_rows]
  float* hidden = nullptr;                    // [num_hidden_rows, hidden_size], after the last norm
  const float* received = nullptr;  // [num_tokens, hidden_size] of the stage before; first: null
  float* passed = nullptr;          // [num_tokens, hidden_size] for the stage after; last: null
};

class Decoder {
 public:
  virtual ~Decoder() = default;
  virtual void step(const Step& step, ThreadPool& pool) = 0;
};

}  // namespace fuserve
