// The decoder stack as phases between barriers; each method is one phase, run by all threads.
#pragma once

#include "attention/attention.h"
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

  // Consecutive tokens of one sequence.
  struct AttentionRange {
    int sequence;
    int first_token;  // in the step
    int tokens;
  };
  // A range and some KV heads, with all splits of the context or one of a long sequence's.
  struct AttentionUnit {
    AttentionRange range;
    int split;  // index among the splits of all long sequences; negative: all of them
    int first_kv_head;
    int num_kv_heads;
  };

  void run(Lane& lane);
  void plan_attention(const Step& step, int num_threads);
  void plan_units(int singles, int num_threads);

  void embed(Lane& lane);
  void attention_half(Lane& lane, int layer);
  void feed_forward_half(Lane& lane, int layer);
  void hidden_states(Lane& lane);
  void logits(Lane& lane);

  // Rows of activations, and which of them are meant; null: all.
  struct Source {
    const float* values;
    std::ptrdiff_t stride;
    int cols;
    int rows;
    const std::int32_t* row_of = nullptr;
  };
  // The rows, normalized (if norm exists), in the forms that the given linears want. Ends with a
  // barrier unless there is one row, which every thread prepares for itself.
  Rows prepare(Lane& lane, const Norm& norm, const Source& source,
               std::initializer_list<const PackedLinear*> consumers);
  void query_key_value(Lane& lane, int layer, const Rows& input);
  void finish_head(Lane& lane, int layer, int head, int token, float* row);
  void attend(Lane& lane, int layer);
  void attend_whole(Lane& lane, int layer, const AttentionUnit& unit);
  void attend_one_split(Lane& lane, int layer, const AttentionUnit& unit);
  void merge_splits(Lane& lane, int layer, int sequence, int kv_head);
  void finish(const AttentionRange& range, int kv_head, const AttentionTask& task,
              const SoftmaxState& total) const;
  SoftmaxStates states_of(int split);
  AttentionTask task_of(int layer, int first_kv_head, int num_kv_heads, const AttentionRange& range,
                        const Step& step) const;
  // x W^T added to hidden, or written to `branch` when a norm comes between.
  void project(Lane& lane, const PackedLinear& w, const Rows& input, bool to_branch);
  void gate_up(Lane& lane, const LayerWeights& weights, const Rows& input);
  // hidden += norm(branch), or hidden = norm(hidden); ends with a barrier.
  void add_normalized_branch(Lane& lane, const Norm& norm);
  void normalize_hidden(Lane& lane, const Norm& norm);

  Source hidden_rows_of(int tokens) const {
    return {work_.hidden, model_.hidden_size, model_.hidden_size, tokens};
  }
  float* hidden_row(int token) const {
    return work_.hidden + static_cast<std::ptrdiff_t>(token) * model_.hidden_size;
  }

  DecoderModel model_;
  KVCache cache_;
  Workspace work_;
  std::vector<AttentionRange> ranges_;  // query tiles attended to whole
  std::vector<AttentionRange> long_;    // single tokens with long contexts, attended to in splits
  std::vector<AttentionUnit> units_;
  std::vector<float> split_states_;
  int max_splits_ = 0;
  std::vector<int> sequence_of_;  // [tokens]
};

}  // namespace fuserve::FUSERVE_ISA
