// The attention phase: how queries are cut into tasks.
#include <algorithm>

#include "attention/attention.h"
#include "decoder/fused_decoder.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// Query rows of a prefill task: their states and scores stay in the first-level cache.
constexpr int kTaskRows = 48;

// Units of single tokens that each thread should find, so that all end at about the same time.
constexpr int kUnitsPerThread = 16;

constexpr int kWhole = -1;  // a unit that attends to all splits

}  // namespace

void FusedDecoder::plan_attention(const Step& step, int num_threads) {
  const AttentionShape& shape = model_.attention;
  const int tile = std::max(1, kTaskRows / shape.heads_per_kv());
  ranges_.clear();
  long_.clear();
  max_splits_ = 0;
  int singles = 0;
  sequence_of_.resize(static_cast<size_t>(step.num_tokens));
  for (int s = 0; s < step.num_sequences; ++s) {
    const int first = step.query_starts[s], last = step.query_starts[s + 1];
    std::fill(sequence_of_.begin() + first, sequence_of_.begin() + last, s);
    if (first == last) continue;
    const int splits = step.positions[last - 1] / kSplitTokens + 1;
    if (last - first == 1) singles += splits;
    if (last - first == 1 && splits > 1 && num_threads > 1) {
      long_.push_back({s, first, 1});
      max_splits_ = std::max(max_splits_, splits);
      continue;
    }
    for (int token = first; token < last; token += tile)
      ranges_.push_back({s, token, std::min(tile, last - token)});
  }
  split_states_.resize(long_.size() * static_cast<size_t>(max_splits_ * shape.num_kv_heads) *
                       SoftmaxState::floats(shape.heads_per_kv(), shape.padded_head_dim()));
  plan_units(singles, num_threads);
}

void FusedDecoder::plan_units(int singles, int num_threads) {
  const int kv_heads = model_.attention.num_kv_heads;
  // The more KV heads a token's unit has, the longer are the runs that it reads.
  const int together =
      std::clamp(kv_heads * singles / (kUnitsPerThread * num_threads), 1, kv_heads);
  const auto add = [&](const AttentionRange& range, int split, int heads) {
    for (int first = 0; first < kv_heads; first += heads)
      units_.push_back({range, split, first, std::min(heads, kv_heads - first)});
  };
  units_.clear();
  for (size_t i = 0; i < long_.size(); ++i)
    for (int split = 0; split < max_splits_; ++split)
      add(long_[i], static_cast<int>(i) * max_splits_ + split, together);
  // The last tiles of a prompt see the most keys: begin with them.
  for (auto range = ranges_.rbegin(); range != ranges_.rend(); ++range)
    add(*range, kWhole, range->tokens == 1 ? together : 1);
}

AttentionTask FusedDecoder::task_of(int layer, int first_kv_head, int num_kv_heads,
                                    const AttentionRange& range, const Step& step) const {
  const AttentionShape& shape = model_.attention;
  const int padded = shape.padded_head_dim();
  AttentionTask task;
  task.layer = layer;
  task.first_kv_head = first_kv_head;
  task.num_kv_heads = std::min(num_kv_heads, shape.num_kv_heads - first_kv_head);
  task.window = model_.layers[static_cast<size_t>(layer)].window;
  task.first_position = step.positions[range.first_token];
  task.tokens = range.tokens;
  task.block_table = step.block_tables + range.sequence * step.table_width;
  task.query_stride = static_cast<std::ptrdiff_t>(shape.num_heads) * padded;
  task.queries = work_.queries + range.first_token * task.query_stride +
                 first_kv_head * shape.heads_per_kv() * padded;
  return task;
}

void FusedDecoder::attend(Lane& lane, int layer) {
  lane.team.for_each(lane.thread, static_cast<int>(units_.size()), [&](int i) {
    const AttentionUnit& unit = units_[static_cast<size_t>(i)];
    unit.split == kWhole ? attend_whole(lane, layer, unit) : attend_one_split(lane, layer, unit);
  });
  lane.team.sync(lane.thread);
  if (long_.empty()) return;
  const int kv_heads = model_.attention.num_kv_heads;
  lane.team.for_each(lane.thread, static_cast<int>(long_.size()) * kv_heads,
                     [&](int i) { merge_splits(lane, layer, i / kv_heads, i % kv_heads); });
  lane.team.sync(lane.thread);
}

// The states of a long sequence's split, one for each KV head.
SoftmaxStates FusedDecoder::states_of(int split) {
  const AttentionShape& shape = model_.attention;
  SoftmaxStates states{nullptr, shape.heads_per_kv(), shape.padded_head_dim()};
  states.memory =
      split_states_.data() + static_cast<size_t>(split * shape.num_kv_heads) * states.floats();
  return states;
}

void FusedDecoder::attend_one_split(Lane& lane, int layer, const AttentionUnit& unit) {
  const AttentionTask task =
      task_of(layer, unit.first_kv_head, unit.num_kv_heads, unit.range, lane.step);
  const int split = unit.split % max_splits_;
  if (split < task.first_split() || split >= task.end_split()) return;
  SoftmaxStates states = states_of(unit.split);
  states.memory += static_cast<size_t>(unit.first_kv_head) * states.floats();
  attend_split(model_.attention, cache_, task, split, states, lane.memory.attention);
}

void FusedDecoder::merge_splits(Lane& lane, int layer, int sequence, int kv_head) {
  const AttentionRange& range = long_[static_cast<size_t>(sequence)];
  const AttentionTask task = task_of(layer, kv_head, 1, range, lane.step);
  const int rows = task_rows(model_.attention, task);
  const int padded = model_.attention.padded_head_dim();
  auto* memory = lane.memory.softmax.get<float>(SoftmaxState::floats(rows, padded));
  const SoftmaxState total = SoftmaxState::in(memory, rows, padded);
  total.clear(rows, padded);
  for (int split = task.first_split(); split < task.end_split(); ++split)
    merge_split(rows, padded, states_of(sequence * max_splits_ + split).of(kv_head), total);
  finish(range, kv_head, task, total);
}

void FusedDecoder::attend_whole(Lane& lane, int layer, const AttentionUnit& unit) {
  const AttentionTask task =
      task_of(layer, unit.first_kv_head, unit.num_kv_heads, unit.range, lane.step);
  const int rows = task_rows(model_.attention, task);
  const int padded = model_.attention.padded_head_dim();
  const size_t floats = static_cast<size_t>(unit.num_kv_heads) * SoftmaxState::floats(rows, padded);
  auto* memory = lane.memory.softmax.get<float>(2 * floats);
  const SoftmaxStates total{memory, rows, padded}, part{memory + floats, rows, padded};
  for (int h = 0; h < unit.num_kv_heads; ++h) total.of(h).clear(rows, padded);
  for (int split = task.first_split(); split < task.end_split(); ++split) {
    attend_split(model_.attention, cache_, task, split, part, lane.memory.attention);
    for (int h = 0; h < unit.num_kv_heads; ++h) merge_split(rows, padded, part.of(h), total.of(h));
  }
  for (int h = 0; h < unit.num_kv_heads; ++h)
    finish(unit.range, unit.first_kv_head + h, task, total.of(h));
}

void FusedDecoder::finish(const AttentionRange& range, int kv_head, const AttentionTask& task,
                          const SoftmaxState& total) const {
  const AttentionShape& shape = model_.attention;
  const std::ptrdiff_t stride = shape.num_heads * shape.head_dim;
  finish_attention(shape, task, total,
                   work_.attention + range.first_token * stride +
                       kv_head * shape.heads_per_kv() * shape.head_dim,
                   stride);
}

}  // namespace fuserve::FUSERVE_ISA
