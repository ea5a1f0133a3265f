// The decoder stack as phases between barriers; each method is one phase, run by all threads.
#pragma once

#include <array>
#include <atomic>
#include <exception>
#include <utility>

#include "attention/attention.h"
#include "decoder/decoder.h"
#include "decoder/workspace.h"

namespace fuserve::FUSERVE_ISA {

class FusedDecoder final : public Decoder {
 public:
  FusedDecoder(DecoderModel model, KVCache cache);

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

  void receive(Lane& lane);
  void embed(Lane& lane);
  void embed_with_ranks(Lane& lane);
  void finish_embedding(const Step& step, int token);
  void rotation_angles(const Step& step, int token);
  void attention_half(Lane& lane, int layer);
  void feed_forward_half(Lane& lane, int layer);
  void pass_on(Lane& lane);
  void hidden_states(Lane& lane);
  void logits(Lane& lane);
  template <class F>
  void logit_rows(Lane& lane, const Rows& input, int first, int last, F&& row_of);

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
  // Rows cut into the parts of a linear's features, each part in the forms that it wants.
  using PartSources = std::array<std::pair<const float*, std::ptrdiff_t>, kMostParts>;
  using PartRows = std::array<Rows, kMostParts>;
  PartRows prepare_parts(Lane& lane, const PartSources& sources, const RowSplit& split);
  PartRows activated(Lane& lane, const RowSplit& down);
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
  // x W^T + bias added to hidden, or written to `branch` when a norm comes between.
  void project(Lane& lane, const RowSplit& split, const PartRows& input);
  // Calls f(row, col, n, sum) for each run of n <= 16 outputs of rows [first, last).
  template <class F>
  void product_rows(Lane& lane, const RowSplit& split, const PartRows& input, int first, int last,
                    F&& f);
  // Rows of so many floats that ranks exchange at a time.
  int rows_per_exchange(int width) const;
  // Waits for this rank's threads and calls `exchange` on one of them. False if it has failed, now
  // or before: then all threads leave the step.
  template <class F>
  bool meet(Lane& lane, F&& exchange);
  // Calls f(row, col, n, sum) for each run of n <= 16 of the sums of `rows` rows of hidden size.
  template <class F>
  void add_ranks(Lane& lane, int rows, F&& f);
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

  // Features of the feed-forward half that are made together, all of one part of the down
  // projection.
  struct FeedForwardUnit {
    int part;
    int begin;  // in the part
    int first;  // in the half
    int count;
  };

  DecoderModel model_;
  KVCache cache_;
  Workspace work_;
  std::vector<AttentionRange> ranges_;  // query tiles attended to whole
  std::vector<AttentionRange> long_;    // single tokens with long contexts, attended to in splits
  std::vector<AttentionUnit> units_;
  std::vector<float> split_states_;
  int max_splits_ = 0;
  std::vector<int> sequence_of_;  // [tokens]
  std::vector<FeedForwardUnit> feed_forward_units_;
  std::atomic<bool> failed_ = false;  // set before a barrier, read behind it
  std::exception_ptr failure_;
};

}  // namespace fuserve::FUSERVE_ISA
