// The attention phase: how queries are cut into tasks.
#include <algorithm>

#include "attention/attention.h"
#include "decoder/fused_decoder.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// Query rows of a prefill task: their states and scores stay in the first-level cache.
constexpr int kTaskRows = 48;

}  // namespace

void FusedDecoder::plan_attention(const Step& step, int num_threads) {
  const int tile = std::max(1, kTaskRows / model_.attention.heads_per_kv());
  ranges_.clear();
  long_.clear();
  max_splits_ = 0;
  sequence_of_.resize(static_cast<size_t>(step.num_tokens));
  for (int s = 0; s < step.num_sequences; ++s) {
    const int first = step.query_starts[s], last = step.query_starts[s + 1];
    std::fill(sequence_of_.begin() + first, sequence_of_.begin() + last, s);
    if (first == last) continue;
    const int splits = step.positions[last - 1] / kSplitTokens + 1;
    if (last - first == 1 && splits > 1 && num_threads > 1) {
      long_.push_back({s, first, 1});
      max_splits_ = std::max(max_splits_, splits);
      continue;
    }
    for (int token = first; token < last; token += tile)
      ranges_.push_back({s, token, std::min(tile, last - token)});
  }
  // The last tiles of a prompt see the most keys: begin with them.
  std::reverse(ranges_.begin(), ranges_.end());
  const AttentionShape& shape = model_.attention;
  split_states_.resize(long_.size() * static_cast<size_t>(max_splits_ * shape.num_kv_heads) *
                       SoftmaxState::floats(shape.heads_per_kv(), shape.padded_head_dim()));
}

AttentionTask FusedDecoder::task_of(int layer, int kv_head, const AttentionRange& range,
                                    const Step& step) const {
  const AttentionShape& shape = model_.attention;
  const int padded = shape.padded_head_dim();
  AttentionTask task;
  task.layer = layer;
  task.kv_head = kv_head;
  task.window = model_.layers[static_cast<size_t>(layer)].window;
  task.first_position = step.positions[range.first_token];
  task.tokens = range.tokens;
  task.block_table = step.block_tables + range.sequence * step.table_width;
  task.query_stride = static_cast<std::ptrdiff_t>(shape.num_heads) * padded;
  task.queries = work_.queries + range.first_token * task.query_stride +
                 kv_head * shape.heads_per_kv() * padded;
  return task;
}

void FusedDecoder::attend(Lane& lane, int layer) {
  const AttentionShape& shape = model_.attention;
  const int out_stride = shape.num_heads * shape.head_dim;
  const int padded = shape.padded_head_dim(), kv_heads = shape.num_kv_heads;
  const auto out_of = [&](const AttentionRange& range, int kv_head) {
    return work_.attention + static_cast<std::ptrdiff_t>(range.first_token) * out_stride +
           kv_head * shape.heads_per_kv() * shape.head_dim;
  };
  const int whole = static_cast<int>(ranges_.size()) * kv_heads;
  const int in_splits = static_cast<int>(long_.size()) * kv_heads * max_splits_;
  const int heads = shape.heads_per_kv();
  const size_t state_floats = SoftmaxState::floats(heads, padded);
  lane.team.for_each(lane.thread, in_splits + whole, [&](int i) {
    if (i < in_splits) {
      const int split = i % max_splits_, kv_head = i / max_splits_ % kv_heads;
      const AttentionRange& range = long_[static_cast<size_t>(i / max_splits_ / kv_heads)];
      const AttentionTask task = task_of(layer, kv_head, range, lane.step);
      if (split < task.first_split() || split >= task.end_split()) return;
      float* memory = split_states_.data() + static_cast<size_t>(i) * state_floats;
      attend_split(shape, cache_, task, split, SoftmaxState::in(memory, heads, padded),
                   lane.memory.attention);
      return;
    }
    const int kv_head = (i - in_splits) % kv_heads;
    const AttentionRange& range = ranges_[static_cast<size_t>((i - in_splits) / kv_heads)];
    const AttentionTask task = task_of(layer, kv_head, range, lane.step);
    const int rows = task_rows(shape, task);
    const size_t floats = SoftmaxState::floats(rows, padded);
    auto* memory = lane.memory.softmax.get<float>(2 * floats);
    const SoftmaxState total = SoftmaxState::in(memory, rows, padded);
    const SoftmaxState part = SoftmaxState::in(memory + floats, rows, padded);
    total.clear(rows, padded);
    for (int split = task.first_split(); split < task.end_split(); ++split) {
      attend_split(shape, cache_, task, split, part, lane.memory.attention);
      merge_split(rows, padded, part, total);
    }
    finish_attention(shape, task, total, out_of(range, kv_head), out_stride);
  });
  lane.team.sync(lane.thread);
  if (long_.empty()) return;
  lane.team.for_each(lane.thread, static_cast<int>(long_.size()) * kv_heads, [&](int i) {
    const AttentionRange& range = long_[static_cast<size_t>(i / kv_heads)];
    const AttentionTask task = task_of(layer, i % kv_heads, range, lane.step);
    auto* memory = lane.memory.softmax.get<float>(state_floats);
    const SoftmaxState total = SoftmaxState::in(memory, heads, padded);
    total.clear(heads, padded);
    for (int split = task.first_split(); split < task.end_split(); ++split) {
      const auto index = static_cast<size_t>(i * max_splits_ + split);
      merge_split(heads, padded,
                  SoftmaxState::in(split_states_.data() + index * state_floats, heads, padded),
                  total);
    }
    finish_attention(shape, task, total, out_of(range, i % kv_heads), out_stride);
  });
  lane.team.sync(lane.thread);
}

}  // namespace fuserve::FUSERVE_ISA
