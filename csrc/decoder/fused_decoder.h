// The decoder stack as phases between barriers; each method is one phase, run by all threads.
#pragma once

#include "decoder/decoder.h"
#include "decoder/workspace.h"

namespace fuserve::FUSERVE_ISA {

class FusedDecoder final : public Decoder {
 public:
  FusedDecoder(DecoderModel model, KVCache cache) : model_(std::move(model)), cache_(cache) {}

  void step(const Step& step, ThreadPool& pool) override;

 private:
  // One thread's place in the running step.
  struct Lane {
    Team& team;
    int thread;
    const Step& step;
    ThreadMemory& memory;
  };

  void run(Lane& lane);
  void plan_attention(const Step& step, int num_threads);

  void embed(Lane& lane);
  void attention_half(Lane& lane, int layer);
  void feed_forward_half(Lane& lane, int layer);
  void hidden_states(Lane& lane);
  void logits(Lane& lane);

  // Normalized (if norm exists) and quantized rows of x for the given linears. `row_of` picks the
  // rows; null: all of them. Ends with a barrier unless there is one row, which every thread
  // prepares for itself.
  Rows prepare(Lane& lane, const Norm& norm, const float* x, int cols, int rows,
               const std::int32_t* row_of, std::initializer_list<const PackedLinear*> consumers);
  void query_key_value(Lane& lane, int layer, const Rows& input);
  void finish_head(Lane& lane, int layer, int head, int token, float* row);
  void attend(Lane& lane, int layer);
  // x W^T added to hidden, or written to `branch` when a norm comes between.
  void project(Lane& lane, const PackedLinear& w, const Rows& input, bool to_branch);
  void gate_up(Lane& lane, const LayerWeights& weights, const Rows& input);
  // hidden += norm(branch), or hidden = norm(hidden); ends with a barrier.
  void add_normalized_branch(Lane& lane, const Norm& norm);
  void normalize_hidden(Lane& lane, const Norm& norm);

  float* hidden_row(int token) const {
    return work_.hidden + static_cast<std::ptrdiff_t>(token) * model_.hidden_size;
  }

  struct AttentionRange {
    int sequence;
    int first_token;  // in the step
    int tokens;
  };
  AttentionTask task_of(int layer, int kv_head, const AttentionRange& range,
                        const Step& step) const;

  DecoderModel model_;
  KVCache cache_;
  Workspace work_;
  std::vector<AttentionRange> ranges_;  // query tiles attended to whole
  std::vector<AttentionRange> long_;    // single tokens with long contexts, attended to in splits
  std::vector<float> split_states_;
  int max_splits_ = 0;
  std::vector<int> sequence_of_;  // [tokens]
};

}  // namespace fuserve::FUSERVE_ISA
